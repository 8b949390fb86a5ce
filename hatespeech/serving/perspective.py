"""Perspective API's comments:analyze, as far as a hate speech score can honestly answer it.

https://developers.perspectiveapi.com/s/about-the-api-methods. IDENTITY_ATTACK is P(Hate). TOXICITY is P(Hate) +
P(Neutral) / 2: it ranks texts as the expected score does, but MHS never asked its annotators about rudeness, so treat
it as a proxy and set thresholds anew. Every other attribute is refused, as Perspective refuses an unknown one.
"""

from hatespeech.serving.service import Answer

ATTRIBUTES = {
    "IDENTITY_ATTACK": lambda p: p["Hate"],
    "TOXICITY": lambda p: p["Hate"] + p["Neutral"] / 2,
}


class Refused(Exception):
    """A request that Perspective would refuse with INVALID_ARGUMENT."""


def parse(body: object) -> tuple[str, list[str]]:
    """Text and requested attributes of an AnalyzeComment request. Raises Refused where it is none."""
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    comment, requested = body.get("comment"), body.get("requestedAttributes")
    if not isinstance(comment, dict) or not isinstance(comment.get("text"), str):
        raise Refused("comment.text must be a string")
    if comment.get("type", "PLAIN_TEXT") not in ("PLAIN_TEXT", "TEXT_TYPE_UNSPECIFIED"):
        raise Refused("comment.type must be PLAIN_TEXT")
    if not isinstance(requested, dict) or not requested:
        raise Refused("requestedAttributes must name at least one attribute")
    unknown = sorted(set(requested) - set(ATTRIBUTES))
    if unknown:
        raise Refused(f"Attribute {unknown[0][:100]} is not supported. Supported: {', '.join(ATTRIBUTES)}")
    languages = body.get("languages") or ["en"]
    if not isinstance(languages, list) or any(language != "en" for language in languages):
        raise Refused("the only language supported is en")
    return comment["text"], list(requested)


def response(answer: Answer, text: str, requested: list[str], client_token: object = None) -> dict:
    """An AnalyzeComment response."""
    scores = {}
    for name in requested:
        value = {"value": ATTRIBUTES[name](answer.by_label), "type": "PROBABILITY"}
        scores[name] = {"spanScores": [{"begin": 0, "end": len(text), "score": value}], "summaryScore": value}
    body = {"attributeScores": scores, "languages": ["en"], "detectedLanguages": ["en"]}
    return body | ({"clientToken": client_token} if isinstance(client_token, str) else {})


def error(message: str, code: int = 400, status: str = "INVALID_ARGUMENT") -> dict:
    """An error as Google's APIs word it."""
    return {"error": {"code": code, "message": message, "status": status}}


def discovery(root_url: str) -> dict:
    """The discovery document from which google-api-python-client builds its `comments().analyze()`."""
    method = {
        "id": "commentanalyzer.comments.analyze",
        "path": "v1alpha1/comments:analyze",
        "flatPath": "v1alpha1/comments:analyze",
        "httpMethod": "POST",
        "parameters": {},
        "parameterOrder": [],
        "request": {"$ref": "AnalyzeCommentRequest"},
        "response": {"$ref": "AnalyzeCommentResponse"},
    }
    anything = {"type": "object", "additionalProperties": {"type": "any"}}
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
        "resources": {"comments": {"methods": {"analyze": method}}},
        "schemas": {name: {"id": name, **anything} for name in ("AnalyzeCommentRequest", "AnalyzeCommentResponse")},
    }
