"""Google's own client against the real service, with only the address changed."""

import json
import threading

import pytest
from werkzeug.serving import make_server

pytestmark = pytest.mark.slow  # Google's client takes seconds to import


@pytest.fixture
def analyzer(client):
    from googleapiclient import discovery

    listener = make_server("127.0.0.1", 0, client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.port}/$discovery/rest?version=v1alpha1"
    yield discovery.build(
        "commentanalyzer", "v1alpha1", developerKey="a-key-of-googles", discoveryServiceUrl=url, static_discovery=False
    )
    listener.shutdown()


def ask(text: str = "a lovely day", attributes=("TOXICITY", "IDENTITY_ATTACK"), **more) -> dict:
    return {"comment": {"text": text}, "requestedAttributes": {name: {} for name in attributes}} | more


def test_perspectives_client_gets_our_probabilities(analyzer, client):
    got = analyzer.comments().analyze(body=ask(clientToken="t", languages=["en"])).execute()
    ours = client.post("/infer", json={"text": "a lovely day"}).get_json()["probabilities"]
    scores = {name: entry["summaryScore"] for name, entry in got["attributeScores"].items()}
    assert scores["IDENTITY_ATTACK"] == {"value": pytest.approx(ours["Hate"], abs=0.01), "type": "PROBABILITY"}
    assert scores["TOXICITY"]["value"] == pytest.approx(ours["Hate"] + ours["Neutral"] / 2, abs=0.01)
    span = got["attributeScores"]["TOXICITY"]["spanScores"][0]
    assert (span["begin"], span["end"], span["score"]) == (0, 12, scores["TOXICITY"])
    assert (got["languages"], got["clientToken"]) == (["en"], "t")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ask(attributes=["SPAM"]), "Attribute SPAM is not supported"),
        (ask(attributes=[]), "at least one attribute"),
        (ask(languages=["de"]), "only language supported is en"),
        (ask(text=""), "minLength"),
        (ask(comment={"text": "a", "type": "HTML"}), "PLAIN_TEXT"),
        ({"comment": "a"}, "comment.text"),
        ([], "not a JSON object"),
    ],
)
def test_what_perspective_would_refuse(analyzer, body, reason):
    from googleapiclient.errors import HttpError

    with pytest.raises(HttpError) as raised:
        analyzer.comments().analyze(body=body).execute()
    assert raised.value.resp.status == 400
    error = json.loads(raised.value.content)["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert reason in error["message"]


def test_a_text_too_long_is_an_error_of_googles_shape(analyzer):
    from googleapiclient.errors import HttpError

    with pytest.raises(HttpError) as raised:
        analyzer.comments().analyze(body=ask(text="word " * 3000)).execute()
    assert json.loads(raised.value.content)["error"]["code"] == 413
