"""OpenAI's own client against the service, with only the address changed."""

import threading

import pytest
from werkzeug.serving import make_server

from hatespeech.serving.store import Store


@pytest.fixture
def openai(client):
    openai = pytest.importorskip("openai")
    listener = make_server("127.0.0.1", 0, client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{listener.port}/v1", api_key="a-key-of-openais", max_retries=0)
    listener.shutdown()


def test_openais_client_gets_our_verdict(openai, client):
    ours = client.post("/infer", json={"text": "I hope you all have a lovely day"}).get_json()
    got = openai.moderations.create(input="I hope you all have a lovely day")
    (result,) = got.results
    assert (result.flagged, result.categories.hate) == (ours["flagged"], ours["flagged"])
    assert result.category_scores.hate == pytest.approx(ours["probabilities"]["Hate"], abs=0.01)
    assert got.model == ours["model"]["name"]
    answered = {row.id for row in Store(f"sqlite:///{client.database}").answered()}
    assert got.id.removeprefix("modr-") in answered


def test_a_list_is_answered_in_order(openai):
    texts = ["I hope you all have a lovely day", "you are all idiots", "some text"]
    alone = [openai.moderations.create(input=text).results[0].category_scores.hate for text in texts]
    together = openai.moderations.create(input=texts).results
    assert [result.category_scores.hate for result in together] == pytest.approx(alone, abs=0.02)
    parts = openai.moderations.create(input=[{"type": "text", "text": texts[1]}]).results
    assert parts[0].category_scores.hate == pytest.approx(alone[1], abs=0.02)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": 5},
        {"input": ""},
        {"input": ["a", " "]},
        {"input": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]},
        {"input": "\ud800"},
        [],
    ],
)
def test_what_is_no_text_is_an_error_of_openais_shape(client, body):
    refused = client.post("/v1/moderations", json=body)
    error = refused.get_json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert error["message"]


def test_other_errors_are_of_that_shape_too(make_client, client):
    down = make_client("127.0.0.1:1").post("/v1/moderations", json={"input": "a"})
    assert (down.status_code, down.get_json()["error"]["type"]) == (503, "server_error")
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    refused = client.post("/v1/moderations", json={"input": "a"}, environ_overrides=elsewhere)
    assert (refused.status_code, refused.get_json()["error"]["code"]) == (401, "invalid_api_key")
