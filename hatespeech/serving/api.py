"""The API: classify one text or many, correct an answer, see how the service is doing. openapi.yaml describes it."""

import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import parse_qs

from flask import Blueprint, Response, g, request, stream_with_context
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, UnsupportedMediaType

from hatespeech import task
from hatespeech.ollama import OllamaError
from hatespeech.serving import openapi, reporting
from hatespeech.serving.parameters import span_of
from hatespeech.serving.parts import parts
from hatespeech.serving.service import Answer, Busy, status_of

api = Blueprint("api", __name__)

# The content security policy of what is no page.
NOTHING_LOADS = "default-src 'none'; frame-ancestors 'none'"
# A body of these types may be a text. Its type is not the text's own word: curl calls everything a form.
TEXT_TYPES = ("", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "application/json")


@api.post("/infer")
def infer() -> Response:
    text, sent = text_sent()
    truncate = request.args.get("truncate", "false").lower()
    if truncate not in ("true", "false", "1", "0"):
        raise refused(text, "truncate is true or false")
    answer = classified(text, truncate=truncate in ("true", "1"))
    headers = {"X-Answer-Id": answer.request_id}
    if answer.cut_to is not None:
        headers["X-Truncated-To"] = str(answer.cut_to)
    if sent is not None or wants_json():
        return as_json(answer.as_json((sent or {}).get("id")), headers)
    return Response(answer.label, mimetype="text/plain", headers=headers)


def text_sent() -> tuple[bytes, dict | None]:
    """The text in the request's body; and, where that was JSON, the object it came in."""
    body = body_read()
    if request.mimetype == "multipart/form-data":
        sent = request.files.get("text")
        if sent is None and "text" not in request.form:
            raise refused(None, "a form has the text in a field called text", UnsupportedMediaType)
        if sent:
            return sent.read(), None
        text = request.form["text"]
        if "\ufffd" in text and "\ufffd".encode() not in body:  # werkzeug's own, for bytes that are no UTF-8
            raise refused(None, "the text is not UTF-8")
        return text.encode("utf-8", "surrogatepass"), None
    if request.mimetype not in TEXT_TYPES:
        raise refused(
            body, f"{request.mimetype[:100]} is no text; these are: {', '.join(TEXT_TYPES[1:])}", UnsupportedMediaType
        )
    if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise refused(body, "texts are UTF-8", UnsupportedMediaType)
    if request.mimetype == "application/x-www-form-urlencoded":
        return _of_form(body), None
    if request.mimetype != "application/json":
        return body, None
    value = openapi.parsed(body)
    value = {"text": value} if isinstance(value, str) else value
    looks_like_json = body.lstrip().startswith((b"{", b"[", b'"')) or body.strip() == b"null"
    if value is None and not wants_json() and not looks_like_json:
        return body, None  # a bare text under the wrong name
    if reason := openapi.schema_error("Text", value):
        raise refused(body, reason)
    return value["text"].encode(), value


def _of_form(body: bytes) -> bytes:
    """A form's field `text`; a body that is no form is the text, since curl says of everything that it is a form."""
    if not re.fullmatch(rb"[\w.\[\]-]+=[^&\s]*(&[\w.\[\]-]+=[^&\s]*)*", body):
        return body
    fields = parse_qs(body.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="surrogateescape")
    if "text" in fields:
        return fields["text"][0].encode("utf-8", "surrogateescape")
    if b"%" in body or b"+" in body:
        raise refused(body, "a form has the text in a field called text", UnsupportedMediaType)
    return body


@api.post("/infer/batch")
def infer_batch() -> Response:
    body = body_read()
    items = (
        openapi.parsed(body)
        if request.mimetype == "application/json"
        else body.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    )
    if not body:
        raise refused(body, "the body is empty")
    if not isinstance(items, list):
        raise refused(body, "the body is neither a JSON list nor NDJSON (Content-Type: application/x-ndjson)")
    if not parts().batches.acquire(blocking=False):
        raise Busy("too many batches are being answered")
    response = Response(stream_with_context(_lines(items)), mimetype="application/x-ndjson")
    response.call_on_close(parts().batches.release)
    return response


def _lines(items: list) -> Iterator[str]:
    """An answer for each item: a value of a JSON list, or a line, of which blank ones are none."""
    for item in items:
        if isinstance(item, bytes) and not item.strip():
            continue
        value = openapi.parsed(item) if isinstance(item, bytes) else item
        value = {"text": value} if isinstance(value, str) else value
        try:
            if reason := openapi.schema_error("Text", value):
                raise refused(_as_sent(item), reason)
            line = classified(value["text"].encode(), wait_for_queue=True).as_json(value.get("id"))
        except (HTTPException, OllamaError, Busy, SQLAlchemyError) as error:
            line = problem(*status_of(error))
            if isinstance(value, dict) and isinstance(value.get("id"), str | int):
                line["id"] = value["id"]
        yield json.dumps(line) + "\n"


def _as_sent(item: object) -> bytes | None:
    """An item of a batch, for the log."""
    try:
        if isinstance(item, bytes):
            return item
        return json.dumps(item, ensure_ascii=False).encode("utf-8", "backslashreplace")
    except RecursionError:
        return None


@api.post("/feedback")
def feedback() -> Response:
    value = openapi.parsed(body_read())
    if reason := openapi.schema_error("Feedback", value):
        raise BadRequest(reason)
    label, score = value.get("label"), value.get("score")
    if label and score is not None and task.label_of(score) != label:
        raise BadRequest(f"a score of {score:g} is {task.label_of(score)}, not {label}")
    if not parts().store.add_feedback(value["id"], label, score, value.get("note"), g.api_key):
        raise NotFound("no request has this id")
    return Response(status=204)


@api.get("/healthcheck")
def healthcheck() -> Response:
    """Whom the service does not know learns whether it is well, and nothing of what is behind it."""
    try:
        health = parts().service.health()
    except OllamaError as error:
        if g.is_known:
            raise
        raise OllamaError("no text can be classified now") from error
    if not wants_json():
        return Response("OK", mimetype="text/plain")
    return as_json(health if g.is_known else {"status": "OK"})


@api.get("/metrics")
def metrics() -> Response:
    return Response(parts().metrics.exposition(), mimetype="text/plain")


@api.get("/report.json")
def report() -> Response:
    return as_json(reporting.report(parts().store, span_of(request.args), parts().reference))


@api.get("/openapi.json")
def specification() -> Response:
    return as_json(openapi.specification())


def classified(body: bytes, **how) -> Answer:
    """Service.classify for this request, counted in the metrics."""
    try:
        answer = parts().service.classify(body, route=request.path, api_key=g.api_key, **how)
    except OllamaError as error:
        parts().metrics.ollama_error(type(error).__name__)
        raise
    parts().metrics.answer(answer.label, answer.abstain)
    return answer


def body_read() -> bytes:
    """The request's body, its form parsed if it is one; a body that can't be read is logged as refused."""
    try:
        body = request.get_data()
        if request.mimetype == "multipart/form-data":
            request.form.get("text")
        return body
    except HTTPException as error:
        parts().service.refuse(None, error.code, error.name, route=request.path, api_key=g.api_key)
        raise


def refused(body: bytes | None, reason: str, kind: type[HTTPException] = BadRequest) -> HTTPException:
    """An error of this kind, logged with what came."""
    parts().service.refuse(body, kind.code, reason, route=request.path, api_key=g.api_key)
    return kind(reason)


def wants_json() -> bool:
    return request.accept_mimetypes.best_match(["text/plain", "application/json"]) == "application/json"


def as_json(value: object, headers: dict | None = None, status: int = 200, mimetype="application/json") -> Response:
    return Response(json.dumps(value), status, headers, mimetype=mimetype)


def problem(status: int, detail: str | None) -> dict:
    """Problem details for HTTP APIs, RFC 9457."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status), "detail": detail}


def error_response(status: int, detail: str | None, headers: dict) -> Response:
    return as_json(problem(status, detail), headers, status, "application/problem+json")
