"""Perspective API's comments:analyze and comments:suggestscore, as far as a hate speech score can honestly answer them.

https://developers.perspectiveapi.com/s/about-the-api-methods. IDENTITY_ATTACK is P(Hate). TOXICITY is P(Hate) +
P(Neutral) / 2: it ranks texts as the expected score does, but MHS never asked its annotators about rudeness, so treat
it as a proxy and set thresholds anew. Every other attribute is refused, as Perspective refuses an unknown one, or left
out where PERSPECTIVE_UNSUPPORTED=omit.
"""

from dataclasses import dataclass

from flask import Blueprint, Response, g, request

from hatespeech import task
from hatespeech.serving import openapi
from hatespeech.serving.api import as_json, body_read, classified
from hatespeech.serving.parts import parts
from hatespeech.serving.service import Answer

perspective = Blueprint("perspective", __name__)

ATTRIBUTES = {
    "IDENTITY_ATTACK": lambda p: p["Hate"],
    "TOXICITY": lambda p: p["Hate"] + p["Neutral"] / 2,
}
# https://cloud.google.com/apis/design/errors#handling_errors: the statuses that Google's clients know, and their codes.
STATUSES = {
    400: (400, "INVALID_ARGUMENT"),
    401: (401, "UNAUTHENTICATED"),
    403: (403, "PERMISSION_DENIED"),
    404: (404, "NOT_FOUND"),
    413: (400, "INVALID_ARGUMENT"),
    429: (429, "RESOURCE_EXHAUSTED"),
    500: (500, "INTERNAL"),
    502: (503, "UNAVAILABLE"),
    503: (503, "UNAVAILABLE"),
}


class Refused(Exception):
    """A request that Perspective would refuse with INVALID_ARGUMENT."""


@dataclass(frozen=True)
class Analyze:
    """An AnalyzeComment request. thresholds: of each attribute asked for; a lower score is left out of the answer."""

    text: str
    thresholds: dict[str, float]
    language: str
    keep_text: bool
    client_token: str | None


@perspective.post("/v1alpha1/comments:analyze")
def analyze() -> Response:
    body = body_read()
    try:
        asked = parsed(openapi.parsed(body), parts().settings.perspective_unsupported == "omit")
    except Refused as error:
        return refused(body, error)
    answer = classified(asked.text.encode(), keep_text=asked.keep_text)
    return as_json(response(answer, asked))


@perspective.post("/v1alpha1/comments:suggestscore")
def suggest_score() -> Response:
    body = body_read()
    try:
        value = openapi.parsed(body)
        text, suggested, token = parsed_suggestion(value)
    except Refused as error:
        return refused(body, error)
    answer = classified(text.encode(), keep_text=value.get("doNotStore", False) is False)
    # Perspective's scores know no supportive speech: what is not hateful may be Neutral or Supportive. A TOXICITY of
    # 0.5 is that of a neutral text here; from 0.75 on, a text is rather Hate.
    hateful = suggested.get("IDENTITY_ATTACK", 0) >= 0.5 or suggested.get("TOXICITY", 0) >= 0.75
    label = "Hate" if hateful else task.NOT_HATE
    note = "suggestscore " + ", ".join(f"{name} {value:g}" for name, value in suggested.items())
    parts().store.add_feedback(answer.request_id, label, None, note, g.api_key)
    return as_json({"detectedLanguages": ["en"]} | ({"clientToken": token} if token else {}))


@perspective.get("/$discovery/rest")
def discovery() -> Response:
    return as_json(discovery_document(request.url_root))


def refused(body: bytes, error: Refused) -> Response:
    """Log a refusal, without the text where the request asked that it be forgotten, and say it as Google does."""
    value = openapi.parsed(body)
    # Of what can't be read nobody knows whether it was to be forgotten.
    forget = not isinstance(value, dict) or value.get("doNotStore", False) is not False
    reason = "refused, and not to be stored" if forget else str(error)
    parts().service.refuse(None if forget else body, 400, reason, route=request.path, api_key=g.api_key)
    return error_response(400, str(error), {})


def parsed(body: object, omit_unsupported: bool = False) -> Analyze:
    """An AnalyzeComment request. Raises Refused where it is none."""
    text = _text(body)
    requested = body.get("requestedAttributes")
    if not isinstance(requested, dict) or not requested:
        raise Refused("requestedAttributes must name at least one attribute")
    unknown = sorted(set(requested) - set(ATTRIBUTES))
    if unknown and not omit_unsupported:
        names = ", ".join(name[:100] for name in unknown[:20])
        what = f"Attribute {names} is" if len(unknown) == 1 else f"Attributes {names} are"
        raise Refused(f"{what} not supported. Supported: {', '.join(ATTRIBUTES)}")
    thresholds = {}
    for name in [name for name in requested if name in ATTRIBUTES]:
        config = requested[name]
        threshold = config.get("scoreThreshold", 0) if isinstance(config, dict) else None
        if not _is_probability(threshold):
            raise Refused(f"requestedAttributes.{name}.scoreThreshold must be a number from 0 to 1")
        thresholds[name] = threshold
    do_not_store = body.get("doNotStore", False)
    if not isinstance(do_not_store, bool):
        raise Refused("doNotStore must be true or false")
    return Analyze(text, thresholds, _language(body), not do_not_store, _client_token(body))


def parsed_suggestion(body: object) -> tuple[str, dict[str, float], str | None]:
    """The text, scores by attribute and client token of a SuggestCommentScore request. Raises Refused."""
    text, scores = _text(body), body.get("attributeScores")
    _language(body)
    if not isinstance(scores, dict) or not scores:
        raise Refused("attributeScores must name at least one attribute")
    found = {}
    for name in sorted(scores.keys() & ATTRIBUTES.keys()):
        try:
            found[name] = scores[name]["summaryScore"]["value"]
        except (KeyError, TypeError):
            found[name] = None
        if not _is_probability(found[name]):
            raise Refused(f"attributeScores.{name}.summaryScore.value must be a number from 0 to 1")
    if not found:
        raise Refused(f"no attribute is supported. Supported: {', '.join(ATTRIBUTES)}")
    return text, found, _client_token(body)


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _text(body: object) -> str:
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    if reason := openapi.half_a_character(body):
        raise Refused(reason)
    comment = body.get("comment")
    if not isinstance(comment, dict) or not isinstance(comment.get("text"), str):
        raise Refused("comment.text must be a string")
    if comment.get("type", "PLAIN_TEXT") not in ("PLAIN_TEXT", "TEXT_TYPE_UNSPECIFIED"):
        raise Refused("comment.type must be PLAIN_TEXT")
    if reason := task.text_error(comment["text"]):
        raise Refused(f"comment.text: {reason}")
    return comment["text"]


def _language(body: dict) -> str:
    """The language asked for; a region (en-US) makes no difference."""
    languages = body.get("languages", [])
    known = isinstance(languages, list) and all(isinstance(each, str) for each in languages)
    if not known or any(each.replace("_", "-").lower().split("-")[0] != "en" for each in languages):
        raise Refused("the only language supported is en")
    return (languages or ["en"])[0]


def _client_token(body: dict) -> str | None:
    token = body.get("clientToken")
    return token if isinstance(token, str) else None


def response(answer: Answer, asked: Analyze) -> dict:
    """An AnalyzeComment response. A span's end counts UTF-16's units, as Google's JavaScript clients do."""
    scores, end = {}, len(asked.text.encode("utf-16-le")) // 2
    for name, threshold in asked.thresholds.items():
        value = ATTRIBUTES[name](answer.by_label)
        if value >= threshold:
            score = {"value": value, "type": "PROBABILITY"}
            scores[name] = {"spanScores": [{"begin": 0, "end": end, "score": score}], "summaryScore": score}
    body = {"attributeScores": scores, "languages": [asked.language], "detectedLanguages": ["en"]}
    return body | ({"clientToken": asked.client_token} if asked.client_token else {})


def error_response(status: int, message: str | None, headers: dict) -> Response:
    """An error as Google's APIs word it."""
    code, name = STATUSES.get(status, (status, "UNKNOWN" if status >= 500 else "INVALID_ARGUMENT"))
    return as_json({"error": {"code": code, "message": message, "status": name}}, headers, code)


def discovery_document(root_url: str) -> dict:
    """What google-api-python-client builds its `comments().analyze()` and `comments().suggestscore()` from."""
    anything = {"type": "object", "additionalProperties": {"type": "any"}}
    methods, schemas = {}, {}
    for name, message in (("analyze", "AnalyzeComment"), ("suggestscore", "SuggestCommentScore")):
        methods[name] = {
            "id": f"commentanalyzer.comments.{name}",
            "path": f"v1alpha1/comments:{name}",
            "flatPath": f"v1alpha1/comments:{name}",
            "httpMethod": "POST",
            "parameters": {},
            "parameterOrder": [],
            "request": {"$ref": f"{message}Request"},
            "response": {"$ref": f"{message}Response"},
        }
        schemas |= {f"{message}{end}": {"id": f"{message}{end}"} | anything for end in ("Request", "Response")}
    return {
        "kind": "discovery#restDescription",
        "discoveryVersion": "v1",
        "id": "commentanalyzer:v1alpha1",
        "name": "commentanalyzer",
        "version": "v1alpha1",
        "protocol": "rest",
        "rootUrl": root_url,
        "baseUrl": root_url,
        "servicePath": "",
        "batchPath": "batch",
        "parameters": {"key": {"type": "string", "location": "query"}},
        "resources": {"comments": {"methods": methods}},
        "schemas": schemas,
    }
