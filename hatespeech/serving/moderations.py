"""OpenAI's moderation endpoint, as far as a hate speech score can honestly answer it.

https://platform.openai.com/docs/api-reference/moderations. `flagged` is P(Hate) of at least FLAG_ABOVE, or without a
threshold the label Hate; the one category is `hate`, its score P(Hate). OpenAI's other categories are not in the
answer, since this model was not taught them.
"""

from flask import Blueprint, Response

from hatespeech.serving import openapi
from hatespeech.serving.api import as_json, body_read, classified, refused
from hatespeech.serving.parts import parts
from hatespeech.serving.service import Answer, Busy

moderations = Blueprint("moderations", __name__)

MAX_INPUTS = 1024


@moderations.post("/v1/moderations")
def moderate() -> Response:
    body = body_read()
    texts = texts_of(openapi.parsed(body), body)
    if len(texts) > 1 and not parts().batches.acquire(blocking=False):
        raise Busy("too many batches are being answered")
    try:
        answers = [classified(text.encode(), wait_for_queue=len(texts) > 1) for text in texts]
    finally:
        if len(texts) > 1:
            parts().batches.release()
    results = [result(answer) for answer in answers]
    return as_json({"id": f"modr-{answers[0].request_id}", "model": answers[0].model["name"], "results": results})


def texts_of(value: object, body: bytes) -> list[str]:
    """The texts of a request's `input`: a string, a list of them, or a list of {"type": "text", "text": ...}."""
    reason, texts = openapi.half_a_character(value), []
    given = value.get("input") if isinstance(value, dict) else None
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        reason = reason or f"input must be a string, or a list of 1 to {MAX_INPUTS}"
    else:
        texts = [each.get("text") if isinstance(each, dict) else each for each in given]
        if not all(isinstance(text, str) for text in texts):
            reason = reason or "input must hold texts, and nothing else: images can't be judged here"
    if reason:
        raise refused(body, reason)
    return texts


def result(answer: Answer) -> dict:
    hate = answer.by_label["Hate"]
    flagged = answer.label == "Hate" if answer.flagged is None else answer.flagged
    return {
        "flagged": flagged,
        "categories": {"hate": flagged},
        "category_scores": {"hate": hate},
        "category_applied_input_types": {"hate": ["text"]},
    }


def error_response(status: int, message: str | None, headers: dict) -> Response:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = {401: "invalid_api_key"}.get(status)
    return as_json({"error": {"message": message, "type": kind, "param": None, "code": code}}, headers, status)
