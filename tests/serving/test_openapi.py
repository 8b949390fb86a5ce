"""The API's description, schemathesis's odd requests against it, and any JSON in any of its parsers."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.serving import make_server

from app import create_app
from hatespeech.serving import openapi
from tests.conftest import RUN
from tests.stand_in import StandIn

ODD = st.sampled_from(["", "a text", "\ud800", "\0", "text", "\u202e", "a" * 9000, "en-US"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | ODD, inner, max_size=4),
    max_leaves=12,
)


def members(names: str, **more):
    """An object that has some of the members that a route knows, with any values."""
    return st.dictionaries(st.sampled_from(names.split()), JSON | st.sampled_from(list(more.values()) or [None]))


ROUTES = {
    "/infer": members("text id lang"),
    "/infer/batch": st.lists(members("text id") | ODD, max_size=4),
    "/feedback": members("id label score note", label="Hate", score=0.7),
    "/v1alpha1/comments:analyze": members(
        "comment requestedAttributes languages doNotStore clientToken",
        comment={"text": "a text"},
        asked={"TOXICITY": {}},
        odd={"TOXICITY": {"scoreThreshold": float("nan")}, "\ud800": None},
    ),
    "/v1alpha1/comments:suggestscore": members(
        "comment attributeScores languages",
        comment={"text": "a text"},
        scores={"TOXICITY": {"summaryScore": {"value": 0.3}}},
        odd={"TOXICITY": {"summaryScore": {"value": 1e400}}},
    ),
}


@pytest.fixture(scope="module")
def quick_client(tmp_path_factory):
    """Before a stand-in, since thousands of requests come."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = {
        "MODEL_DIR": str(RUN),
        "DATABASE_URL": f"sqlite:///{folder}/log.sqlite3",
        "UPLOADS_DIR": str(folder / "files"),
    }
    with StandIn.running() as stand_in:
        yield create_app(config | {"OLLAMA_HOST": stand_in.host}).test_client()


FINE = (200, 204, 400, 404, 413, 415)


@pytest.mark.parametrize("route", ROUTES)
def test_no_json_is_a_500(quick_client, route):
    """Whatever is sent: an answer, or what is wrong with the request, in JSON."""

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(value=ROUTES[route] | JSON, kind=st.sampled_from(["application/json", "application/x-ndjson", "text/plain"]))
    def answers(value, kind):
        with quick_client.post(route, data=json.dumps(value), content_type=kind) as answer:
            assert answer.status_code in FINE, answer.text
            for line in answer.text.splitlines():
                if answer.mimetype != "text/plain":
                    assert json.loads(line).get("status", 200) in FINE, line

    answers()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=60), kind=st.sampled_from(["", "application/json", "text/plain", "multipart/form-data"]))
@pytest.mark.parametrize("route", ROUTES)
def test_no_bytes_are_a_500(quick_client, route, body, kind):
    with quick_client.post(route, data=body, content_type=kind) as answer:
        assert answer.status_code in FINE


def test_every_route_is_described(client):
    described = client.get("/openapi.json").get_json()["paths"]
    rules = client.application.url_map.iter_rules()
    routes = {rule.rule for rule in rules if not rule.endpoint.startswith("pages.")}
    assert set(described) == routes - {"/$discovery/rest", "/openapi.json"}


def test_what_is_visible_is_found_in_linear_time():
    """A pattern that tries every place for the visible character would take minutes for this."""
    assert "no NUL" in openapi.schema_error("Text", {"text": "a" * 500_000 + "\0"})
    assert "visible" in openapi.schema_error("Text", {"text": " " * 500_000})


def test_flaws_quote_nothing():
    assert openapi.schema_error("Text", {"text": "a"}) is None
    for value in ({"text": ["secret"]}, {"secret": 1}, "secret", {"id": "x", "label": "secret"}):
        for schema in ("Text", "Feedback"):
            assert "secret" not in openapi.schema_error(schema, value)


def test_schemathesis(quick_client, tmp_path):
    """All its checks on all of the API: what the description allows is accepted, what it forbids refused, and no answer
    is another than described. schemathesis.toml has the two rules that a schema can't express."""
    listener = make_server("127.0.0.1", 0, quick_client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    tool, config = Path(sys.executable).with_name("schemathesis"), Path(__file__).with_name("schemathesis.toml")
    address = f"http://127.0.0.1:{listener.port}/openapi.json"
    options = ["--checks", "all", "--max-examples", "40", "--seed", "1", "--no-color"]
    command = [str(tool), "--config-file", str(config), "run", address, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    listener.shutdown()
    print(done.stdout[done.stdout.find("Test Phases") :])
    assert done.returncode == 0, done.stdout
    assert "9 selected / 9 total" in done.stdout
