"""The API's description, openapi.yaml, whose schemas also check requests; and JSON as the service takes it."""

import functools
import json
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from hatespeech import __version__, tables

# What a rule of JSON Schema asks, in words.
SCHEMA_WORDS = {
    "type": "must be of the type {}",
    "enum": "must be one of {}",
    "pattern": "must hold something visible, and no NUL",
    "maxLength": "must have at most {} characters",
    "minimum": "must be at least {}",
    "maximum": "must be at most {}",
}


@functools.cache
def specification() -> dict:
    """OpenAPI 3.1, as GET /openapi.json gives it."""
    described = yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text())
    described["info"]["version"] = __version__
    return described


@functools.cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}"} | specification())


def schema_error(name: str, value: object) -> str | None:
    """What is wrong with a JSON value as this schema, in words that quote none of its text; None where nothing is."""
    if reason := half_a_character(value):
        return reason
    for error in _validator(name).iter_errors(value):
        where = ".".join(map(str, error.absolute_path)) or "the body"
        if error.validator in ("required", "additionalProperties", "anyOf"):
            needed = " and ".join(error.schema["required"]) + (" and label or score" if "anyOf" in error.schema else "")
            return f"{where} takes {', '.join(error.schema['properties'])}; it needs {needed}"
        words = SCHEMA_WORDS.get(error.validator, f"breaks the rule {error.validator}: {{}}")
        value = error.validator_value
        return f"{where} {words.format(', '.join(map(str, value)) if isinstance(value, list) else value)}"
    return None


def parsed(body: bytes) -> object:
    """The JSON value of a body, members that are null left out; None where it is none. NaN and Infinity are no JSON."""
    try:
        return json.loads(body, parse_constant=tables.no_constant, object_pairs_hook=_without_nulls)
    except (ValueError, RecursionError):
        return None


def half_a_character(value: object) -> str | None:
    """What is wrong where a string in a JSON value, or a name, holds a lone surrogate; else None."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a string holds a lone surrogate, which is no character"
    except RecursionError:
        return "the body is nested too deep"
    return None


def _without_nulls(members: list[tuple[str, object]]) -> dict:
    return {name: value for name, value in members if value is not None}
