"""The service: a text in, its label out, every request in the log.

    ./bootstrap.sh                                  # set up and serve; or, where all is set up:
    gunicorn --config python:hatespeech.serving.gunicorn_conf --bind 127.0.0.1:5000 'app:create_app()'
    curl localhost:5000/infer -d 'some text'
    flask --app app --help                          # keys, feedback export, classify, replay, purge

A request to /infer goes: auth.py, admit() -> infer() -> service.py, Service.classify() -> here again.
"""

import json
import logging
import math
import os
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from flask import Flask, Response, g, request, stream_with_context
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, Unauthorized, UnsupportedMediaType

from hatespeech import UserError, runs, task
from hatespeech.hosts import Hosts
from hatespeech.ollama import Ollama, OllamaError
from hatespeech.runs import model_name
from hatespeech.serving import auth, commands, openapi, pages, perspective, reporting
from hatespeech.serving.metrics import Metrics
from hatespeech.serving.service import Answer, Busy, Gate, Service, status_of
from hatespeech.serving.store import Store
from hatespeech.serving.uploads import Uploads

ROOT = Path(__file__).parent
DEFAULTS = {
    "MODEL_DIR": str(ROOT / "results" / "smollm2-135m"),
    "OLLAMA_HOST": "127.0.0.1:11434",
    "OLLAMA_HOSTS": "",  # several instead, separated by commas: the least busy healthy one is asked
    "OLLAMA_TIMEOUT_S": "10",
    "DATABASE_URL": f"sqlite:///{ROOT / '.data' / 'requests.sqlite3'}",
    "UPLOADS_DIR": str(ROOT / ".data" / "files"),  # files given to the page; deleted there
    "HOST": "127.0.0.1",  # where it listens: off loopback it asks for API keys
    "REQUIRE_API_KEY": "",  # set it to demand keys here too
    "TRUSTED_HOSTS": "",  # names besides localhost that it may be asked by without a key, separated by commas
    "TRUSTED_PROXIES": "",  # how many proxies stand before it, whose X-Forwarded-* headers then count
    "MAX_IN_FLIGHT": "4",  # requests at each Ollama at a time
    "MAX_QUEUE": "32",  # requests waiting for that
    "FLAG_ABOVE": "",  # the P(Hate) from which on an answer is flagged; the calibration's own where this is not set
    "LOG_TEXT": "full",
    "LOG_HASH_KEY": "",
}
# The content security policy of what is no page.
NOTHING_LOADS = "default-src 'none'; frame-ancestors 'none'"


def create_app(config: dict | None = None) -> Flask:
    """The Flask app. Settings are DEFAULTS, overridden by the environment, overridden by config."""
    app = Flask(__name__, static_folder=None)
    app.config |= {name: os.environ.get(name, default) for name, default in DEFAULTS.items()}
    app.config |= {"MAX_CONTENT_LENGTH": 1024 * 1024} | (config or {})
    timeout_s, run = float(app.config["OLLAMA_TIMEOUT_S"]), Path(app.config["MODEL_DIR"])
    run_settings = runs.read_settings(run)
    flag_above = flag_above_of(app.config["FLAG_ABOVE"])
    store = Store(app.config["DATABASE_URL"], app.config["LOG_TEXT"], app.config["LOG_HASH_KEY"])
    hosts, tokens = app.config["OLLAMA_HOSTS"] or app.config["OLLAMA_HOST"], tuple(run_settings["label_tokens"])
    ollama = Hosts([Ollama(host.strip(), model_name(run), tokens, timeout_s) for host in hosts.split(",")])
    places = len(ollama.servers) * int(app.config["MAX_IN_FLIGHT"])
    gate = Gate(places, int(app.config["MAX_QUEUE"]), timeout_s)
    service = Service(run, ollama, store, gate, tuple(run_settings["class_scores"]), flag_above)
    reference = reporting.load_reference(run)
    uploads = Uploads(Path(app.config["UPLOADS_DIR"]), service)
    metrics = Metrics(gate)
    access_log = logging.getLogger("hatespeech.access")
    access_log.setLevel(logging.INFO)
    if not access_log.handlers:
        access_log.addHandler(logging.StreamHandler())
    commands.register(app, store, service)

    @app.before_request
    def begin() -> None:
        g.started, offered = time.perf_counter(), request.headers.get("X-Request-Id", "")
        g.request_id = offered if re.fullmatch(r"[\w.:-]{1,64}", offered, re.ASCII) else uuid.uuid4().hex
        g.api_key, g.api_key_id = None, None

    auth.register(app, store)

    @app.after_request
    def end(response: Response) -> Response:
        response.headers |= {
            "X-Request-Id": g.request_id,
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": pages.CONTENT_SECURITY_POLICY if request.blueprint else NOTHING_LOADS,
            "Cache-Control": "no-store",
            "Referrer-Policy": "same-origin" if request.blueprint else "no-referrer",
        }
        duration_s = time.perf_counter() - g.started
        metrics.request(request.url_rule.rule if request.url_rule else "none", response.status_code, duration_s)
        line = {"request_id": g.request_id, "method": request.method, "path": request.path, "api_key": g.api_key}
        line |= {"status": response.status_code, "duration_ms": round(duration_s * 1000, 1)}
        access_log.info(json.dumps(line))
        return response

    def body_read() -> bytes:
        """The request's body; one that can't be read is logged as refused."""
        try:
            return request.get_data()
        except HTTPException as error:
            service.refuse(None, error.code, error.name, route=request.path, api_key=g.api_key)
            raise

    def refused(body: bytes, reason: str) -> BadRequest:
        service.refuse(body, 400, reason, route=request.path, api_key=g.api_key)
        return BadRequest(reason)

    def classified(body: bytes, patient: bool = False) -> Answer:
        try:
            answer = service.classify(body, route=request.path, api_key=g.api_key, patient=patient)
        except OllamaError as error:
            metrics.ollama_error(type(error).__name__)
            raise
        metrics.answer(answer.label, answer.abstain)
        return answer

    @app.post("/infer")
    def infer() -> Response:
        """Classify one text.
        ---
        post:
          summary: Classify one text
          description: |
            The body is the text, whatever its Content-Type; or {"text": "..."} as application/json. The answer is the
            bare label, or JSON if the body was JSON or Accept asks for it.
          requestBody:
            required: true
            content:
              text/plain: {schema: {type: string, minLength: 1}}
              application/json: {schema: {$ref: '#/components/schemas/Text'}}
          responses:
            200:
              description: the label
              headers: {X-Answer-Id: {schema: {type: string}, description: "for /feedback"}}
              content:
                text/plain: {schema: {type: string, enum: [Hate, Neutral, Supportive]}}
                application/json: {schema: {$ref: '#/components/schemas/Answer'}}
            default: {$ref: '#/components/responses/Problem'}
        """
        body = body_read()
        if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("texts are UTF-8")
        wants_json = request.accept_mimetypes.best_match(["text/plain", "application/json"]) == "application/json"
        text, is_json = body, False
        if request.mimetype == "application/json":
            value = parsed(body)
            is_json = isinstance(value, dict) and "text" in value
            if is_json and (reason := flaw_of(value)):
                raise refused(body, reason)
            if not is_json and wants_json:
                raise refused(body, 'the body is not {"text": "..."}')
            if is_json:
                text = value["text"].encode()
        answer = classified(text)
        if is_json or wants_json:
            return as_json(answer.as_json(), {"X-Answer-Id": answer.id})
        return Response(answer.label, mimetype="text/plain", headers={"X-Answer-Id": answer.id})

    @app.post("/infer/batch")
    def infer_batch() -> Response:
        """Classify many texts.
        ---
        post:
          summary: Classify many texts
          description: |
            A JSON list, or NDJSON, of strings or {"text": "..."}. Answers are NDJSON in the same order, sent as they
            come; one that fails is a problem in its place, with a status of its own.
          requestBody:
            required: true
            content:
              application/json:
                schema: {type: array, items: {anyOf: [{type: string}, {$ref: '#/components/schemas/Text'}]}}
              application/x-ndjson: {schema: {type: string}}
          responses:
            200:
              description: a line of JSON for each text, an Answer or a Problem
              content: {application/x-ndjson: {schema: {type: string}}}
            default: {$ref: '#/components/responses/Problem'}
        """
        body = body_read()
        items = parsed(body) if request.mimetype == "application/json" else [parsed(line) for line in body.splitlines()]
        if not isinstance(items, list):
            raise refused(body, "the body is neither a JSON list nor NDJSON (Content-Type: application/x-ndjson)")

        def lines() -> Iterator[str]:
            for item in items:
                item = {"text": item} if isinstance(item, str) else item
                try:
                    if reason := flaw_of(item):
                        raise refused(json.dumps(item).encode(), reason)
                    yield json.dumps(classified(item["text"].encode(), patient=True).as_json()) + "\n"
                except (HTTPException, OllamaError, Busy, SQLAlchemyError) as error:
                    yield json.dumps(problem_of(*status_of(error))) + "\n"

        return Response(stream_with_context(lines()), mimetype="application/x-ndjson")

    @app.post("/v1alpha1/comments:analyze")
    def analyze() -> Response:
        """Perspective API's method.
        ---
        post:
          summary: Classify as Perspective API's comments:analyze does
          description: IDENTITY_ATTACK is P(Hate); TOXICITY is P(Hate) + P(Neutral) / 2, a proxy. There is no other.
          requestBody:
            required: true
            content: {application/json: {schema: {type: object}}}
          responses:
            200: {description: attribute scores, content: {application/json: {schema: {type: object}}}}
            default: {description: an error as Google words it, content: {application/json: {schema: {type: object}}}}
        """
        body = body_read()
        value = parsed(body)
        try:
            text, requested = perspective.parse(value)
            if reason := flaw_of({"text": text}):
                raise perspective.Refused(reason)
        except perspective.Refused as error:
            service.refuse(body, 400, str(error), route=request.path, api_key=g.api_key)
            return as_json(perspective.error(str(error)), status=400)
        answer = classified(text.encode())
        return as_json(perspective.response(answer, text, requested, value.get("clientToken")))

    @app.get("/$discovery/rest")
    def discovery() -> Response:
        return as_json(perspective.discovery(request.url_root))

    @app.post("/feedback")
    def feedback() -> Response:
        """Say what an answer should have been.
        ---
        post:
          summary: Say what an answer should have been
          description: Kept beside the request; earlier feedback stays. The newest is exported for training.
          requestBody:
            required: true
            content: {application/json: {schema: {$ref: '#/components/schemas/Feedback'}}}
          responses:
            204: {description: kept}
            default: {$ref: '#/components/responses/Problem'}
        """
        value = parsed(body_read())
        if reason := openapi.flaw("Feedback", value):
            raise BadRequest(reason)
        label, score = value.get("label"), value.get("score")
        if label and score is not None and task.label_of(score) != label:
            raise BadRequest(f"a score of {score:g} is {task.label_of(score)}, not {label}")
        if not store.add_feedback(value["id"], label, score, value.get("note"), g.api_key):
            raise NotFound("no request has this id")
        return Response(status=204)

    @app.get("/healthcheck")
    def healthcheck() -> Response:
        """Can a text be classified and logged now?
        ---
        get:
          summary: Can a text be classified and logged now?
          description: |
            As JSON it tells the model, the P(Hate) from which on answers are flagged (flag_above, null where there is
            none), why no calibration applies, and how each Ollama is.
          responses:
            200:
              description: yes
              content:
                text/plain: {schema: {type: string, enum: [OK]}}
                application/json: {schema: {type: object}}
            default: {$ref: '#/components/responses/Problem'}
        """
        health = service.health()
        if request.accept_mimetypes.best_match(["text/plain", "application/json"]) == "application/json":
            return as_json(health)
        return Response("OK", mimetype="text/plain")

    @app.get("/metrics")
    def prometheus() -> Response:
        """Prometheus metrics.
        ---
        get:
          summary: Prometheus metrics
          responses:
            200: {description: counters and histograms, content: {text/plain: {schema: {type: string}}}}
            default: {$ref: '#/components/responses/Problem'}
        """
        return Response(metrics.exposition(), mimetype="text/plain")

    @app.get("/report.json")
    def report() -> Response:
        """How the service is doing.
        ---
        get:
          summary: How the service is doing
          description: Requests, latency, abstention, drift, agreement with feedback; what the page /report shows.
          parameters:
            - {in: query, name: since, schema: {type: string}, description: "ISO 8601, UTC; 30 days before until"}
            - {in: query, name: until, schema: {type: string}, description: "ISO 8601, UTC; now"}
            - {in: query, name: model, schema: {type: string}, description: "a model_digest"}
          responses:
            200: {description: all figures, content: {application/json: {schema: {type: object}}}}
            default: {$ref: '#/components/responses/Problem'}
        """
        return as_json(reporting.report(store, pages.span_of(request.args), reference))

    @app.get("/openapi.json")
    def specification() -> Response:
        return as_json(openapi.specification(app))

    @app.errorhandler(Exception)
    def answer_error(error: Exception) -> Response:
        status, detail = status_of(error)
        headers = {}
        if isinstance(error, SQLAlchemyError):
            app.logger.error("the log can't be written: %s", type(error).__name__)  # str(error) would hold the text
            status, detail = 503, "the request log can't be written, and nothing is answered unlogged"
        elif status == HTTPStatus.INTERNAL_SERVER_ERROR:
            where = "".join(traceback.format_tb(error.__traceback__))  # without the message, which might hold the text
            app.logger.error("unexpected %s\n%s", type(error).__name__, where)
        if isinstance(error, Busy):
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, HTTPException) and error.code == 405:
            headers["Allow"] = ", ".join(sorted(error.valid_methods or []))
        if request.blueprint:
            return pages.error(status, detail, headers)
        if request.path == "/v1alpha1/comments:analyze":
            return as_json(perspective.error(detail, status, HTTPStatus(status).name), headers, status)
        return as_json(problem_of(status, detail), headers, status, "application/problem+json")

    pages.register(app, service, store, uploads, reference, classified)
    auth.require_scopes(app)
    return app


def flag_above_of(setting: str | float) -> float | None:
    """FLAG_ABOVE, a probability; None where it is not set. Raises UserError where it is none."""
    if setting == "":
        return None
    try:
        threshold = float(setting)
    except ValueError:
        threshold = math.nan
    if not 0 < threshold < 1:
        raise UserError(f"FLAG_ABOVE is a probability of Hate, a number above 0 and below 1, not {setting!r}")
    return threshold


def parsed(body: bytes) -> object:
    """The JSON value of a body; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def flaw_of(value: object) -> str | None:
    """What keeps a JSON value from being a Text."""
    if reason := openapi.flaw("Text", value):
        return reason
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        return f"the text holds a lone surrogate (at {error.start}), which is no character"
    return None


def as_json(value: object, headers: dict | None = None, status: int = 200, mimetype="application/json") -> Response:
    return Response(json.dumps(value), status, headers, mimetype=mimetype)


def problem_of(status: int, detail: str | None) -> dict:
    """Problem details for HTTP APIs, RFC 9457."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status), "detail": detail}
