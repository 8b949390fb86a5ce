"""The API's description, gathered by apispec from the routes' docstrings; its schemas also check requests."""

from apispec import APISpec
from apispec_webframeworks.flask import FlaskPlugin
from flask import Flask
from jsonschema import Draft202012Validator

from hatespeech import __version__, task

LABEL = {"type": "string", "enum": list(task.LABELS)}
PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}

SCHEMAS = {
    "Text": {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 1}},
        "required": ["text"],
        "additionalProperties": False,
    },
    "Answer": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "for /feedback"},
            "label": LABEL,
            "probabilities": {"type": "object", "properties": dict.fromkeys(task.LABELS, PROBABILITY)},
            "score": {"type": "number", "description": "expected, on MHS's scale: above 0.5 Hate, below -1 Supportive"},
            "confidence": PROBABILITY,
            "abstain": {"type": ["boolean", "null"], "description": "too unsure: a person should look"},
            "flagged": {
                "type": ["boolean", "null"],
                "description": "P(Hate) reaches FLAG_ABOVE, or the calibration's own threshold; null without either",
            },
            "model": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "digest": {"type": "string"},
                    "prompt_version": {"type": "string"},
                    "calibrated": {"type": "boolean"},
                },
            },
            "duration_ms": {"type": "number"},
        },
        "required": [
            *("id", "label", "probabilities", "score", "confidence", "abstain", "flagged", "model", "duration_ms"),
        ],
    },
    "Feedback": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "an answer's id"},
            "label": LABEL,
            "score": {"type": "number", "minimum": -20, "maximum": 20, "description": "on MHS's scale"},
            "note": {"type": "string", "maxLength": 2000},
        },
        "required": ["id"],
        "anyOf": [{"required": ["label"]}, {"required": ["score"]}],
        "additionalProperties": False,
    },
    "Problem": {
        "type": "object",
        "description": "RFC 9457",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": ["string", "null"]},
        },
        "required": ["type", "title", "status", "detail"],
    },
}
_VALIDATORS = {name: Draft202012Validator(schema) for name, schema in SCHEMAS.items()}


def flaw(name: str, value: object) -> str | None:
    """What is wrong with a JSON value as this schema, in words that quote none of its text; None where nothing is."""
    for error in _VALIDATORS[name].iter_errors(value):
        where = ".".join(map(str, error.absolute_path)) or "the body"
        if error.validator in ("required", "additionalProperties", "anyOf"):
            needed = " and ".join(error.schema["required"]) + (" and label or score" if "anyOf" in error.schema else "")
            return f"{where} takes {', '.join(error.schema['properties'])}; it needs {needed}"
        return f"{where}: its {error.validator} must be {error.validator_value}"
    return None


def specification(app: Flask) -> dict:
    """OpenAPI 3.1 of every route whose docstring describes it."""
    spec = APISpec("hatespeech", __version__, "3.1.0", plugins=[FlaskPlugin()])
    for name, schema in SCHEMAS.items():
        spec.components.schema(name, schema)
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    spec.components.response("Problem", {"description": "what is wrong", "content": problem})
    spec.components.security_scheme("key", {"type": "http", "scheme": "bearer"})
    with app.test_request_context():
        for view in app.view_functions.values():
            if "---" in (view.__doc__ or ""):
                spec.path(view=view, app=app)
    return spec.to_dict()
