import csv
import json
import shutil

import pytest

from hatespeech import task
from hatespeech.serving.store import Store
from hatespeech.training import data
from tests.conftest import command


@pytest.fixture
def shell(client):
    """shell(words ...): run `hatespeech words ...` on the client's app; the exit code must be 0."""

    def run(*words: str, fails: bool = False) -> str:
        done = command(client, *words)
        assert bool(done.exit_code) == fails, done.output
        return done.output if fails else done.stdout

    return run


def test_keys_are_made_listed_and_taken_back(shell, client):
    key = shell("keys", "create", "bot", "--scopes", "infer,read").strip()
    store = Store(f"sqlite:///{client.database}")
    assert store.key_named(key).name == "bot"
    assert shell("keys", "list").startswith("bot\tinfer read\t")
    shell("keys", "delete", "bot")
    assert store.key_named(key) is None
    assert "no key is named bot" in shell("keys", "delete", "bot", fails=True)
    assert "no such scope: write" in shell("keys", "create", "bot", "--scopes", "write", fails=True)


def test_exported_feedback_is_a_data_set(shell, client, tmp_path):
    ids = [client.post("/infer", json={"text": f"text, number {i}"}).get_json()["id"] for i in range(4)]
    client.post("/feedback", json={"id": ids[0], "label": "Hate"})
    client.post("/feedback", json={"id": ids[0], "label": "Neutral", "note": "no, not that"})
    client.post("/feedback", json={"id": ids[1], "score": -3.5})
    client.post("/feedback", json={"id": ids[2], "label": "Hate", "score": 0.75})
    path = tmp_path / "feedback.csv"
    path.write_text(shell("feedback", "export"))
    with open(path, newline="") as file:
        said = [(row["comment_id"], row["hate_speech_score"], row["label"]) for row in csv.DictReader(file)]
    assert said == [(ids[0], "", "Neutral"), (ids[1], "-3.5", "Supportive"), (ids[2], "0.75", "Hate")]
    frame = data.comments(data.read(str(path))).frame
    assert frame["kind"].tolist() == ["class", "score", "score"]
    assert dict(zip(frame["comment_id"], frame["label"], strict=True)) == {
        ids[0]: "Neutral",
        ids[1]: "Supportive",
        ids[2]: "Hate",
    }
    path = tmp_path / "feedback.jsonl"
    path.write_text(shell("feedback", "export", "--format", "jsonl"))
    again = data.comments(data.read(str(path))).frame
    assert data.fingerprint(again) == data.fingerprint(frame)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["hate_speech_score"] for line in lines] == [None, -3.5, 0.75]
    assert lines[0] == {
        "comment_id": ids[0],
        "text": "text, number 0",
        "hate_speech_score": None,
        "label": "Neutral",
        "note": "no, not that",
    }


def test_replay_through_the_same_model_changes_nothing(shell, client, run):
    for text in ("a lovely day", "some text", "another one"):
        client.post("/infer", data=text)
    output = shell("replay", "--model-dir", str(run))
    assert output.startswith("0 of 3 answers would change")


def test_replay_through_another_model_tells_what_would_change(shell, client, run, create, tmp_path):
    """The base without its adapter, whose labels are another's."""
    other = tmp_path / "bare"
    other.mkdir()
    for name in ("settings.json", "Modelfile"):
        shutil.copy(run / name, other)
    (other / "model.gguf").symlink_to(run / "model.gguf")
    swapped = json.loads((run / "settings.json").read_text())
    swapped["label_tokens"] = swapped["label_tokens"][::-1]
    (other / "settings.json").write_text(json.dumps(swapped))
    create(other)
    client.post("/infer", data="I hope you all have a lovely day")
    output = shell("replay", "--model-dir", str(other))
    assert output.splitlines() == ["1 of 1 answers would change", "Supportive -> Hate\t1"]


def test_replay_of_what_is_no_run(shell, tmp_path):
    assert "no finished run" in shell("replay", "--model-dir", str(tmp_path), fails=True)


def test_purge_deletes_what_is_older_and_its_feedback(shell, client):
    ids = [client.post("/infer", json={"text": "a text"}).get_json()["id"] for _ in range(2)]
    client.post("/feedback", json={"id": ids[0], "label": "Hate"})
    store = Store(f"sqlite:///{client.database}")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE requests SET received_at = '2020-01-01 00:00:00' WHERE id = ?", (ids[0],))
    assert shell("purge", "--older-than", "30d") == "1 requests deleted\n"
    assert [row.id for row in store.latest()] == [ids[1]]
    assert list(store.newest_feedback()) == []
    assert "30d or 12h" in shell("purge", "--older-than", "soon", fails=True)


def test_class_scores_are_of_their_classes(run):
    means = json.loads((run / "settings.json").read_text())["class_scores"]
    assert [task.label_of(mean) for mean in means] == list(task.LABELS)
