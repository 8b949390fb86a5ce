"""The service: a text in, its label out, every request in the log.

./bootstrap.sh                                  # set up and serve; or, where all is set up:
gunicorn --threads 8 'app:create_app()'
curl localhost:5000/infer -d 'some text'
"""

import os
import time
import traceback
from http import HTTPStatus
from pathlib import Path

from flask import Flask, Response, json, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException

from hatespeech import task
from hatespeech.calibration import Calibration
from hatespeech.ollama import Ollama, OllamaError, label_tokens, model_name
from hatespeech.store import ANSWERED, FAILED, REFUSED, Store

ROOT = Path(__file__).parent


def create_app(config: dict | None = None) -> Flask:
    """The Flask app. config overrides the environment: MODEL_DIR, OLLAMA_HOST, OLLAMA_TIMEOUT_S, DATABASE_URL."""
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(
        MODEL_DIR=os.environ.get("MODEL_DIR", str(ROOT / "results" / "smollm2-135m")),
        OLLAMA_HOST=os.environ.get("OLLAMA_HOST", "127.0.0.1:11434"),
        OLLAMA_TIMEOUT_S=float(os.environ.get("OLLAMA_TIMEOUT_S", "10")),
        DATABASE_URL=os.environ.get("DATABASE_URL", f"sqlite:///{ROOT / '.data' / 'requests.sqlite3'}"),
        MAX_CONTENT_LENGTH=1024 * 1024,
    )
    app.config.from_mapping(config or {})
    run = Path(app.config["MODEL_DIR"])
    ollama = Ollama(app.config["OLLAMA_HOST"], model_name(run), label_tokens(run), app.config["OLLAMA_TIMEOUT_S"])
    path = run / "calibration.json"
    calibration = Calibration.load(path) if path.exists() else None
    store = Store(app.config["DATABASE_URL"])

    @app.post("/infer")
    def infer() -> Response:
        """The request's body, whatever its Content-Type, is the text; the answer is its label."""
        started = time.perf_counter()

        def finish(request_id: str, **outcome) -> None:
            duration_ms = (time.perf_counter() - started) * 1000
            store.finished(request_id, duration_ms=duration_ms, **outcome)

        try:
            body = request.get_data()
        except HTTPException as error:  # too large, or broken off: there is no text to keep, but it was a request
            finish(store.received(None, ollama.model), status=REFUSED, http_status=error.code, error=error.name)
            raise
        request_id = store.received(body, ollama.model)
        try:
            text = text_of(body)
            digest = ollama.digest()
            probabilities = ollama.classify(text).probabilities
            if calibration:
                probabilities = tuple(calibration.apply(probabilities).tolist())
        except Exception as error:
            problem = error if isinstance(error, HTTPException) else None
            status = problem.code if problem else getattr(error, "status", HTTPStatus.INTERNAL_SERVER_ERROR)
            reason = problem.description if problem else str(error)
            finish(request_id, status=REFUSED if status < 500 else FAILED, http_status=int(status), error=reason)
            raise
        finish(
            request_id,
            status=ANSWERED,
            http_status=HTTPStatus.OK,
            probabilities=probabilities,
            model_digest=digest,
            calibration=calibration and calibration.version,
        )
        return Response(task.decide(probabilities), mimetype="text/plain", headers={"X-Request-Id": request_id})

    @app.get("/healthcheck")
    def healthcheck() -> Response:
        """200 where a text could be classified and logged now; else the error handlers answer 503."""
        store.check()
        ollama.version()
        ollama.digest()
        return Response("OK", mimetype="text/plain")

    app.register_error_handler(HTTPException, lambda error: problem(error.code, error.description))
    app.register_error_handler(OllamaError, lambda error: problem(error.status, str(error)))

    @app.errorhandler(SQLAlchemyError)
    def unlogged(error: SQLAlchemyError) -> Response:
        app.logger.error("the log can't be written: %s", type(error).__name__)  # str(error) would hold the text
        return problem(503, "the request log can't be written, and nothing is answered unlogged")

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        where = "".join(traceback.format_tb(error.__traceback__))  # without the message, which might hold the text
        app.logger.error("unexpected %s\n%s", type(error).__name__, where)
        return problem(500, "an unexpected error; the service's own log has it")

    return app


def text_of(body: bytes) -> str:
    """The text in a request's body. Raises BadRequest where there is none."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise BadRequest("the body holds no text: curl localhost:5000/infer -d 'some text'")
    if "\0" in text:
        raise BadRequest(f"the text holds a NUL character (at {text.index(chr(0))}), where Ollama would end it")
    return text


def problem(status: int, detail: str | None) -> Response:
    """Problem details for HTTP APIs, RFC 9457."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Response(json.dumps(body), status, mimetype="application/problem+json")
