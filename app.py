"""The service: a text in, its label out, every request in the log.

    ./bootstrap.sh                                  # set up and serve; or, where all is set up:
    gunicorn --config python:hatespeech.serving.gunicorn_conf --bind 127.0.0.1:5000 'app:create_app()'
    curl localhost:5000/infer -d 'some text'
    hatespeech --help                               # keys, feedback export, classify, replay, purge, doctor

A request to /infer goes: auth.py, admit() -> api.py, infer() -> service.py, Service.classify() -> here again.
"""

import json
import logging
import re
import time
import traceback
import uuid
from http import HTTPStatus

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, Unauthorized

from hatespeech import runs
from hatespeech.hosts import Hosts
from hatespeech.ollama import Ollama
from hatespeech.serving import api, auth, moderations, pages, perspective, reporting, settings
from hatespeech.serving.metrics import Metrics
from hatespeech.serving.parts import Parts, parts
from hatespeech.serving.service import Busy, Gate, Service, status_of
from hatespeech.serving.settings import Settings
from hatespeech.serving.store import Store
from hatespeech.serving.uploads import Uploads

access_log = logging.getLogger("hatespeech.access")


def create_app(config: dict | None = None, serves: bool = True) -> Flask:
    """The Flask app. Settings (settings.py) are those of config, before the environment's, before the defaults.

    serves: False for a command, which may be run before there is any API key.

    Raises UserError that names the setting that is wrong.
    """
    app = Flask(__name__, static_folder=None)
    chosen = settings.read(config)
    app.config["MAX_CONTENT_LENGTH"] = chosen.max_content_length
    shared = app.extensions["hatespeech"] = parts_of(chosen)
    access_log.setLevel(logging.INFO)
    if not access_log.handlers:
        access_log.addHandler(logging.StreamHandler())
    app.before_request(begin)
    auth.register(app, shared.store, chosen, serves)
    app.after_request(end)
    app.register_error_handler(Exception, answer_error)
    for blueprint in (api.api, perspective.perspective, moderations.moderations, pages.pages):
        app.register_blueprint(blueprint)
    auth.require_scopes(app)
    return app


def parts_of(chosen: Settings) -> Parts:
    """What the routes share."""
    run = runs.read_settings(chosen.model_dir)
    name, tokens = runs.model_name(chosen.model_dir), tuple(run["label_tokens"])
    timeouts = (chosen.ollama_timeout_s, chosen.ollama_load_timeout_s)
    ollama = Hosts([Ollama(host, name, tokens, *timeouts) for host in chosen.hosts])
    gate = Gate(len(ollama.servers) * chosen.max_in_flight, chosen.max_queue, chosen.ollama_timeout_s)
    store = Store(chosen.database_url, chosen.log_text, chosen.log_hash_key)
    service = Service(chosen.model_dir, ollama, store, gate, tuple(run["class_scores"]), chosen.flag_above)
    uploads = Uploads(chosen.uploads_dir, service, keeps_texts=chosen.log_text == "full")
    return Parts(chosen, store, service, uploads, Metrics(gate), reporting.load_reference(chosen.model_dir))


def begin() -> None:
    """Before anything else: a request has an id and a beginning."""
    g.started, offered = time.perf_counter(), request.headers.get("X-Request-Id", "")
    g.request_id = offered if re.fullmatch(r"[\w.:-]{1,64}", offered, re.ASCII) else uuid.uuid4().hex
    g.api_key = g.api_key_id = None


def end(response: Response) -> Response:
    """Headers that every answer has, and its line in the access log, which tells nothing of its text."""
    is_page = request.blueprint == "pages"
    response.headers |= {
        "X-Request-Id": g.request_id,
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": pages.CONTENT_SECURITY_POLICY if is_page else api.NOTHING_LOADS,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin" if is_page else "no-referrer",
    }
    duration_s = time.perf_counter() - g.started
    route = request.url_rule.rule if request.url_rule else "none"
    parts().metrics.request(route, response.status_code, duration_s)
    line = {"request_id": g.request_id, "method": request.method, "path": request.path, "api_key": g.api_key}
    line |= {"status": response.status_code, "duration_ms": round(duration_s * 1000, 1)}
    access_log.info(json.dumps(line))
    return response


def answer_error(error: Exception) -> Response:
    """An error in the words of the route that it came from: a page's, Google's, or RFC 9457's."""
    status, detail = status_of(error)
    headers = {}
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        where = "".join(traceback.format_tb(error.__traceback__))  # without the message, which might hold the text
        logging.getLogger("app").error("unexpected %s\n%s", type(error).__name__, where)
    elif status == HTTPStatus.SERVICE_UNAVAILABLE and not isinstance(error, HTTPException):
        logging.getLogger("app").error("%s (%s)", detail, type(error).__name__)
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(error.valid_methods or []))
    if request.blueprint == "pages":
        return pages.error_response(status, detail, headers)
    if request.blueprint == "moderations":
        return moderations.error_response(status, detail, headers)
    if request.path.startswith("/v1alpha1/"):
        return perspective.error_response(status, detail, headers)
    return api.error_response(status, detail, headers)
