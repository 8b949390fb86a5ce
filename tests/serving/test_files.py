"""`hatespeech classify`: a file in, the same with columns added out, through the real service."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hatespeech import answers, tables
from hatespeech.serving.store import Store
from tests.conftest import ROOT, command, some_texts

# Line 2 is fine; then a line break in a field, no text, bytes that are no UTF-8, a field too many, a text too long.
ROWS = (
    b'id,text,note\n1,such a day,a\n2,"two\nlines, one text \xf0\x9f\x98\x80",b\n3, ,c\n4,caf\xe9,d\n5,some,text,e\n'
    + b"6,"
    + b"long " * 5000
    + b",f\n"
)


@pytest.fixture
def classify(client):
    """classify(source, target, *options): the command's result, on the client's app."""

    def run(source: Path, target: Path, *options: str):
        return command(client, "classify", str(source), str(target), *options)

    return run


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_every_row_comes_back_with_its_answer_or_its_fault(classify, client, tmp_path):
    (tmp_path / "in.csv").write_bytes(ROWS)
    done = classify(tmp_path / "in.csv", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    assert "out.csv: 6 rows, 4 of them without a label" in done.stdout
    faults = [line for line in done.stderr.splitlines() if line.startswith("line ")]
    assert [fault.split(":")[0] for fault in faults] == ["line 5", "line 6", "line 7", "line 8"]
    assert "there is no text" in faults[0]
    assert "not UTF-8 (byte 3)" in faults[1]
    assert "4 fields, where the header has 3" in faults[2]
    assert "2048 tokens" in faults[3]
    rows = read(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == list("123456")
    assert rows[1]["text"] == "two\nlines, one text 😀"
    assert rows[3]["text"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    asked = client.post("/infer", json={"text": rows[1]["text"]}).get_json()
    assert rows[1]["label"] == asked["label"]
    assert float(rows[1]["p_hate"]) == pytest.approx(asked["probabilities"]["Hate"], abs=1e-3)
    assert rows[1]["abstain"] == str(asked["abstain"])
    logged = {row.id for row in Store(f"sqlite:///{client.database}").answered()}
    assert {rows[0]["request_id"], rows[1]["request_id"]} < logged
    assert sorted(path.name for path in tmp_path.glob("*.csv*")) == ["in.csv", "out.csv"]


def test_parquet_keeps_its_types(classify, tmp_path):
    rows = pyarrow.table({"n": [1, 2, 3], "comment": ["a day", None, "another"]})
    parquet.write_table(rows, tmp_path / "in.parquet")
    done = classify(tmp_path / "in.parquet", tmp_path / "out.parquet", "--text-column", "comment")
    assert done.exit_code == 0, done.output
    out = parquet.read_table(tmp_path / "out.parquet")
    assert out.select(["n", "comment"]).equals(rows)
    assert out["label"].is_valid().to_pylist() == [True, False, True]
    assert out["p_hate"].type == pyarrow.float64()
    assert "there is no text" in out["error"][1].as_py()


def test_what_cannot_be_done_is_said_before_anything_is_asked(classify, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("id,comment,label\n1,a,b\n")
    for options, reason in (
        ((), "no column text (there are: id, comment, label)"),
        (("--text-column", "comment"), "has columns that would be added: label. Give those that are added a prefix"),
    ):
        done = classify(source, target, *options)
        assert (done.exit_code, reason in done.output) == (1, True), done.output
    assert "no such file" in classify(tmp_path / "none.csv", target).output
    source.write_text("text\na\n")
    target.write_text("precious")
    assert "is there already" in classify(source, target).output
    assert target.read_text() == "precious"


def test_a_failing_ollama_stops_it_and_it_goes_on_later(server, stand_in, make_client, classify, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\n" + "a text\n" * 3)
    stand_in.status = 500
    arguments = ["classify", str(source), str(target)]
    failed = command(make_client(stand_in.host), *arguments)
    assert failed.exit_code == 1
    assert "rows are kept: the same command goes on" in failed.output
    assert not target.exists()
    # That Ollama called its model by another digest: its journal is not gone on from unasked.
    assert "was begun with another model" in classify(source, target).output
    Path(f"{target}.progress").unlink()
    assert classify(source, target).exit_code == 0
    assert len(read(target)) == 3


def test_a_torn_line_of_the_journal_is_done_again(classify, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\n" + "".join(f"text {i}\n" for i in range(3)))
    Path(f"{target}.progress").write_bytes(b'{"input_sha256": "tor')
    done = classify(source, target)
    assert done.exit_code == 0, done.output
    assert len(read(target)) == 3


@pytest.mark.slow
def test_kill_9_in_mid_run_loses_no_row_and_doubles_none(server, run, ollama_host, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    texts = some_texts(60)
    with open(source, "w", newline="") as file:
        csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    environment = os.environ | {"MODEL_DIR": str(run), "OLLAMA_HOST": ollama_host}
    environment["DATABASE_URL"] = f"sqlite:///{tmp_path}/requests.sqlite3"
    command = [sys.executable, "-m", "hatespeech.cli", "classify", str(source), str(target)]
    journal, kills, kept = Path(f"{target}.progress"), 0, 0
    while not target.exists():
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
            if lines > kept + 12 and kills < 3:
                kept, kills = lines, kills + 1
                process.kill()
            time.sleep(0.01)
    assert kills == 3
    rows = read(target)
    assert [(int(row["n"]), row["text"]) for row in rows] == list(enumerate(texts))
    assert all(row["label"] for row in rows)
    assert len({row["request_id"] for row in rows}) == 60
    answered = list(Store(environment["DATABASE_URL"]).answered())
    print(f"60 rows, {kills} kills, {len(answered)} answers in the log")
    assert {row["request_id"] for row in rows} <= {row.id for row in answered}
    assert len(answered) <= 60 + 5 * kills  # what was asked when it was killed is asked again
    assert not journal.exists()


def test_a_file_that_another_process_classifies_is_running_here_too(client, tmp_path):
    """Its lock on the journal tells; so it can't be deleted or started a second time."""
    sent = {"file": (io.BytesIO(b"text\nthank you\n"), "a.csv")}
    place = client.post("/file", data=sent).location
    folder = tmp_path / "files" / place.rpartition("/")[2]
    code = "import fcntl, sys\nfile = open(sys.argv[1], 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    code += "print(1, flush=True)\ninput()"
    command = [sys.executable, "-c", code, str(folder / "output.csv.progress")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        assert client.get(f"{place}/state").get_json()["running"]
        assert client.post(place, data={"action": "delete"}).status_code == 409
        assert client.post(place, data={"column": "text"}).status_code == 409
        other.communicate("\n")
    assert not client.get(f"{place}/state").get_json()["running"]
    assert client.post(place, data={"action": "delete"}).status_code == 303


@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl", "rows.csv.gz", "rows.parquet"])
def test_every_kind_of_table_goes_through_the_service(classify, tmp_path, name):
    source, target = tmp_path / name, tmp_path / f"out.{name.partition('.')[2]}"
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"id": ["007"], "text": ["thank you"]}), source)
    else:
        content = {"rows.tsv": b"id\ttext\n007\tthank you\n", "rows.jsonl": b'{"id": "007", "text": "thank you"}\n'}
        source.write_bytes(content.get(name) or gzip.compress(b"id,text\n007,thank you\n"))
    done = classify(source, target, "--prefix", "model_")
    assert done.exit_code == 0, done.output
    table = tables.open_table(str(target))
    (rows,) = table.batches()
    assert rows["text"].to_pylist() == ["thank you"]
    names = table.columns or tuple(json.loads(rows["c0"][0].as_py()))
    assert names == ("id", "text", *(f"model_{column}" for column in answers.COLUMNS))


def test_a_killed_run_goes_on_only_with_the_same_content(stand_in, make_client, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\nthank you\nsome text\n")
    asked = make_client(stand_in.host)
    stand_in.status = 500
    assert command(asked, "classify", str(source), str(target)).exit_code == 1
    was = source.stat()
    source.write_text("text\nthank you\nsame text\n")
    os.utime(source, ns=(was.st_atime_ns, was.st_mtime_ns))
    stand_in.status = 200
    refused = command(asked, "classify", str(source), str(target))
    assert "was begun with another input" in refused.output
    assert refused.exit_code == 1
    assert "call it out.csv" in command(asked, "classify", str(source), str(tmp_path / "out.jsonl")).output


def test_of_two_starts_at_once_one_runs(client, stand_in, make_client, tmp_path):
    stand_in.delay_s = 0.5
    slow = make_client(stand_in.host)
    place = slow.post("/file", data={"file": (io.BytesIO(b"text\na\nb\nc\n"), "a.csv")}).location

    def start(_) -> int:
        return slow.application.test_client().post(place, data={"column": "text"}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(start, range(4))) == [303, 409, 409, 409]
    while slow.get(f"{place}/state").get_json()["running"]:
        time.sleep(0.1)
    assert len(slow.get(f"{place}/download").text.splitlines()) == 4


@pytest.mark.parametrize("journal", [b"my notes\n", b"[1]\n", b"5\n", b'"x"\n', b'{"mine": 1}\n'])
def test_a_file_that_is_no_journal_of_ours_is_left_alone(classify, tmp_path, journal):
    (tmp_path / "in.csv").write_text("text\na\n")
    (tmp_path / "out.csv.progress").write_bytes(journal)
    done = classify(tmp_path / "in.csv", tmp_path / "out.csv")
    assert (done.exit_code, "is no journal of this program" in done.output) == (1, True)
    assert (tmp_path / "out.csv.progress").read_bytes() == journal


@pytest.mark.parametrize("damage", [b"7\n", b'{"a": 1}\n', b"{torn"])
def test_damaged_entries_of_a_journal_are_done_again(stand_in, make_client, tmp_path, damage):
    (tmp_path / "in.csv").write_text("text\na\n")
    asked = make_client(stand_in.host)
    arguments = ["classify", str(tmp_path / "in.csv"), str(tmp_path / "out.csv")]
    stand_in.status = 500
    assert command(asked, *arguments).exit_code == 1
    with open(tmp_path / "out.csv.progress", "ab") as journal:
        journal.write(damage)
    stand_in.status = 200
    done = command(asked, *arguments)
    assert done.exit_code == 0, done.output
    assert len(read(tmp_path / "out.csv")) == 1


def test_a_column_that_no_line_has_is_named_before_anything_is_asked(classify, client, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    done = classify(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--text-column", "txet")
    assert (done.exit_code, "no line has a text in txet" in done.output) == (1, True)
    assert not list(Store(f"sqlite:///{client.database}").answered())


def test_only_what_an_upload_left_is_swept_away(make_client, tmp_path):
    folder, old = tmp_path / "files", time.time() - 3 * 24 * 3600
    for name in (".ssh", ".config", f".{'a' * 32}"):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (old, old))
    (folder / ".dangling").symlink_to("nowhere")
    make_client("127.0.0.1:1")
    assert sorted(path.name for path in folder.iterdir()) == [".config", ".dangling", ".ssh"]


def test_a_name_with_a_line_end_can_be_downloaded(client):
    header = b"Content-Disposition: form-data; name=file; filename*=UTF-8''a%0Ab.csv"
    sent = b"--x\r\n" + header + b"\r\n\r\nid, text\n1, thank you\n\r\n--x--\r\n"
    place = client.post("/file", data=sent, content_type="multipart/form-data; boundary=x").location
    assert 'value=" text"' in client.get(place).text  # a column whose name has a blank
    client.post(place, data={"column": " text"})
    while client.get(f"{place}/state").get_json()["running"]:
        time.sleep(0.05)
    assert client.get(f"{place}/download").status_code == 200
