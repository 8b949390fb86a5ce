"""The API's description, and schemathesis's thousands of odd requests against it, on the real parts."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import negative_data_rejection

from hatespeech import openapi


def test_every_route_is_described(client):
    described = client.get("/openapi.json").get_json()["paths"]
    routes = {rule.rule for rule in client.application.url_map.iter_rules()}
    assert set(described) == routes - {"/$discovery/rest", "/openapi.json"}


def test_flaws_quote_nothing():
    assert openapi.flaw("Text", {"text": "a"}) is None
    for value in ({"text": ["secret"]}, {"secret": 1}, "secret", {"id": "x", "label": "secret"}):
        for schema in ("Text", "Feedback"):
            assert "secret" not in openapi.flaw(schema, value)


def test_schemathesis(client):
    """Every answer conforms to the description, whatever is sent."""
    schema = schemathesis.openapi.from_wsgi("/openapi.json", client.application)
    # /infer takes any body as a text, so what schemathesis means to be wrong may be right
    excluded = [negative_data_rejection]

    for operation in schema.get_all_operations():
        run_operation(operation.ok(), excluded)


def run_operation(operation, excluded) -> None:
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case):
        case.call_and_validate(excluded_checks=excluded)

    check()
