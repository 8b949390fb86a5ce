"""Google's own client against the real service, with only the address changed."""

import json
import shutil
import sqlite3
import subprocess
import threading

import pytest
from werkzeug.serving import make_server

from hatespeech.serving.store import Store


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


NODE = """
const Perspective = require("perspective-api-client");
require("axios").interceptors.request.use((request) => {
  request.url = request.url.replace("https://commentanalyzer.googleapis.com", process.argv[1]);
  return request;
});
const client = new Perspective({ apiKey: "a-key-of-googles" });
client.analyze("a lovely day", { attributes: ["toxicity", "identity_attack"] })
  .then((answer) => console.log(JSON.stringify(answer)))
  .then(() => client.analyze("a lovely day", { attributes: ["threat"] }))
  .catch((error) => console.log(error.name, error.message));
"""


def test_the_client_for_node(client, tmp_path):
    """npm's perspective-api-client, as docs/perspective.md has it."""
    if not shutil.which("npm"):
        pytest.skip("no npm here")
    install = ["npm", "install", "--no-audit", "--no-fund", "perspective-api-client@3.1.0"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=120).returncode:
        pytest.skip("npm can't install perspective-api-client here")
    listener = make_server("127.0.0.1", 0, client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listener.port}"
    done = subprocess.run(["node", "-e", NODE, address], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    listener.shutdown()
    answer, refusal = done.stdout.splitlines()
    assert json.loads(answer)["attributeScores"].keys() == {"TOXICITY", "IDENTITY_ATTACK"}
    assert refusal.startswith("ResponseError Attribute THREAT is not supported")


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
        (ask(attributes=["INSULT", "THREAT", "TOXICITY"]), "Attributes INSULT, THREAT are not supported"),
        (ask(text=" \n"), "comment.text: there is no text"),
        (ask(text="a\ud800"), "lone surrogate"),
        (ask(languages="en"), "only language supported is en"),
        (ask(doNotStore="yes"), "doNotStore must be true or false"),
        (
            {"comment": {"text": "a"}, "requestedAttributes": {"TOXICITY": {"scoreThreshold": 2}}},
            "scoreThreshold must be a number from 0 to 1",
        ),
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
    error = json.loads(raised.value.content)["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")


def analyze(client, **body):
    return client.post("/v1alpha1/comments:analyze", json=body)


def test_a_score_below_its_threshold_is_left_out(client):
    requested = {"TOXICITY": {"scoreThreshold": 0.99}, "IDENTITY_ATTACK": {"scoreThreshold": 0.0}}
    body = {"comment": {"text": "I hope you all have a lovely day"}, "requestedAttributes": requested}
    assert set(analyze(client, **body).get_json()["attributeScores"]) == {"IDENTITY_ATTACK"}


def test_what_is_not_to_be_stored_leaves_a_row_without_its_text(client):
    body = ask(text="canary you are a lovely bunch", doNotStore=True)
    assert analyze(client, **body).status_code == 200
    assert analyze(client, **(body | {"languages": ["de"]})).status_code == 400  # refused, and forgotten too
    broken = json.dumps(body).encode().replace(b"}", b",}")  # of which nobody knows what was asked
    assert client.post("/v1alpha1/comments:analyze", data=broken).status_code == 400
    suggestion = {"comment": {"text": "canary too"}, "attributeScores": {"TOXICITY": {"summaryScore": {"value": 1}}}}
    suggested = client.post("/v1alpha1/comments:suggestscore", json=suggestion | {"doNotStore": True})
    assert suggested.status_code == 200
    named = ask(attributes=["canary"], doNotStore=True)
    assert analyze(client, **named).status_code == 400
    connection = sqlite3.connect(client.database)
    rows = connection.execute(
        "SELECT status, text, text_sha256, text_key FROM requests ORDER BY received_at"
    ).fetchall()
    statuses = ["answered", "refused", "refused", "answered", "refused"]
    assert rows == [(status, None, None, None) for status in statuses]
    assert "canary" not in "".join(connection.iterdump())


@pytest.mark.parametrize("language", ["en", "en-US", "en-gb", "en_AU"])
def test_a_region_makes_no_difference(client, language):
    got = analyze(client, **ask(languages=[language]))
    assert (got.status_code, got.get_json()["languages"]) == (200, [language])


def test_a_span_counts_as_javascript_does(client):
    text = "\U0001f600\U0001f600 such a day"  # two characters of two units each
    span = analyze(client, **ask(text=text)).get_json()["attributeScores"]["TOXICITY"]["spanScores"][0]
    assert (span["begin"], span["end"]) == (0, len(text) + 2)


def test_attributes_that_have_no_score_can_be_left_out(make_client, stand_in):
    client = make_client(stand_in.host, PERSPECTIVE_UNSUPPORTED="omit")
    six = ["TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT"]
    assert set(analyze(client, **ask(attributes=six)).get_json()["attributeScores"]) == {"TOXICITY", "IDENTITY_ATTACK"}


@pytest.mark.parametrize(("value", "label"), [(0, "Not hate"), (0.9, "Hate")])
def test_a_suggested_score_is_kept_as_feedback(analyzer, client, value, label):
    suggested = {"TOXICITY": {"summaryScore": {"value": value}}}
    body = {"comment": {"text": "such a day"}, "attributeScores": suggested, "clientToken": "c:1", "communityId": "f"}
    assert analyzer.comments().suggestscore(body=body).execute()["clientToken"] == "c:1"
    ((asked, said),) = Store(f"sqlite:///{client.database}").newest_feedback()
    assert (asked.text, said.label, said.note) == ("such a day", label, f"suggestscore TOXICITY {value:g}")


@pytest.mark.parametrize(
    "scores",
    [
        None,
        {},
        {"INSULT": {"summaryScore": {"value": 1}}},
        {"TOXICITY": {"summaryScore": 1}},
        {"TOXICITY": {"summaryScore": {"value": 10**400}}},
    ],
)
def test_a_suggestion_that_is_none_is_refused(client, scores):
    body = {"comment": {"text": "such a day"}, "attributeScores": scores}
    refused = client.post("/v1alpha1/comments:suggestscore", json=body)
    assert (refused.status_code, refused.get_json()["error"]["status"]) == (400, "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("request_", "code", "status"),
    [
        ({"method": "GET", "path": "/v1alpha1/comments:analyze"}, 405, "INVALID_ARGUMENT"),
        ({"method": "POST", "path": "/v1alpha1/comments:delete"}, 404, "NOT_FOUND"),
    ],
)
def test_other_errors_are_of_googles_shape_too(client, request_, code, status):
    answered = client.open(**request_)
    assert answered.status_code == code
    assert answered.get_json()["error"]["status"] == status
