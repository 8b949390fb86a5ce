"""The API's description, and schemathesis's odd requests against it, on the real parts."""

import pytest

from hatespeech.serving import openapi


def test_every_route_is_described(client):
    described = client.get("/openapi.json").get_json()["paths"]
    rules = client.application.url_map.iter_rules()
    routes = {rule.rule for rule in rules if not rule.endpoint.startswith("pages.")}
    assert set(described) == routes - {"/$discovery/rest", "/openapi.json"}


def test_flaws_quote_nothing():
    assert openapi.schema_error("Text", {"text": "a"}) is None
    for value in ({"text": ["secret"]}, {"secret": 1}, "secret", {"id": "x", "label": "secret"}):
        for schema in ("Text", "Feedback"):
            assert "secret" not in openapi.schema_error(schema, value)


@pytest.mark.slow
def test_schemathesis(client):
    """Every answer conforms to the description, whatever is sent: 25 requests an operation, where there are so many."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import negative_data_rejection

    cases = []
    unhurried = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in schemathesis.openapi.from_wsgi("/openapi.json", client.application).get_all_operations():

        @unhurried
        @given(case=operation.ok().as_strategy())
        def conforms(case):
            cases.append(case.operation.label)
            # /infer takes any body as a text, so what is meant to be wrong may be right
            case.call_and_validate(excluded_checks=[negative_data_rejection])

        conforms()
    counts = {label: cases.count(label) for label in cases}
    print(f"\nschemathesis: {sum(counts.values())} requests conform, {counts}")
    assert sum(counts.values()) > 100
