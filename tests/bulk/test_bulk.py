"""Bulk scoring on a real Ray, with the shipped model: the service's answers, no row lost or twice, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pandas as pd
import psutil
import pyarrow
import pytest
from pyarrow import parquet

from hatespeech import UserError, tables, task
from hatespeech.bulk import job as bulk
from hatespeech.bulk import scoring
from hatespeech.calibration import Calibration
from tests.conftest import ROOT, RUN, TEST, TRAIN


@pytest.fixture(scope="module")
def ray():
    """One small Ray for this file's quick tests; its logs say nothing of texts."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Comments with an id each; some come twice, one is empty, one too long, one holds a NUL."""
    texts = pd.read_parquet(TEST)["text"][:12].tolist()
    texts += [*texts[:3], 'quoted, "as in CSV"\nand over two lines', "", "word " * 3000, "a\0b"]
    return pd.DataFrame({"id": [f"{number:03}" for number in range(len(texts))], "text": texts})


def written(folder, kind: str) -> pd.DataFrame:
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": pd.read_json}[kind]
    options = {".csv": {"dtype": {"id": str}}, ".jsonl": {"lines": True, "dtype": {"id": str}}}.get(kind, {})
    parts = [read(path, **options) for path in sorted(folder.glob(f"part-*{kind}"))]
    return pd.concat(parts).sort_values("id", ignore_index=True)


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".jsonl"])
def test_each_kind_of_file_keeps_its_rows_and_gets_answers(ray, rows, run, server, ollama_host, tmp_path, kind):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, part in {"a": rows[:9], "b": rows[9:]}.items():
        path = source / f"{name}{kind}"
        if kind == ".csv":
            part.to_csv(path, index=False)
        elif kind == ".parquet":
            part.to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in part.to_dict("records")))
    options = {"model_dir": str(run), "hosts": [ollama_host], "rows_per_part": 5}
    state = bulk.run(f"file://{source}", str(output), **options)
    assert state["finished"]
    assert sum(state["rows"]) == len(rows)
    found = written(output, kind)
    assert found["id"].tolist() == rows["id"].tolist()
    assert found["text"].fillna("").tolist() == rows["text"].tolist()
    calibration = Calibration.load(run / "calibration.json")
    for number, text in enumerate(rows["text"][:15]):
        expected = calibration.apply(server.classify(text).probabilities)
        answer = found.loc[number]
        probabilities = np.array([answer[f"p_{label.lower()}"] for label in task.LABELS], dtype=float)
        assert np.abs(probabilities - expected).max() < 5e-3  # Ollama's own, from one prompt cache to another
        assert answer["label"] == task.decide(probabilities)
        assert answer["score"] == pytest.approx(float(probabilities @ calibration.class_scores), abs=1e-4)
        assert bool(answer["abstain"]) == (max(probabilities) < calibration.abstain_below)
        assert not answer["error"] or pd.isna(answer["error"])
    refused = found[16:]
    assert refused["label"].isna().all()
    for error, words in zip(refused["error"], ("there is no text", "too long", "NUL"), strict=True):
        assert words in error
    if kind == ".parquet":
        path = next(output.glob("part-*"))
        about = json.loads(parquet.read_schema(path).metadata[b"hatespeech"])
        assert about["calibration"] == calibration.version
        assert about["weights_sha256"] == calibration.model_sha256
        assert about["prompt_version"] == task.PROMPT_VERSION
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    bulk.run(f"file://{source}", str(output), **options)  # finished: nothing is made again
    assert {path: path.stat().st_mtime_ns for path in output.glob("part-*")} == before


def test_equal_texts_meet_in_one_part_and_are_scored_once(monkeypatch, run, tmp_path):
    (tmp_path / "in.csv").write_text("text\na\nb\na\nc\nb\na\n")
    table = tables.open_table(str(tmp_path / "in.csv"))
    (rows,) = table.batches()
    texts = rows["text"].to_pylist()
    assert [bulk.buckets([text])[0] for text in texts] == bulk.buckets(texts).tolist()  # wherever they are met
    asked = []

    def load(run, calibration):
        return type(
            "Scorer", (), {"label_probabilities": lambda self, some: asked.extend(some) or np.eye(3)[: len(some)]}
        )()

    monkeypatch.setattr(scoring, "load", load)
    monkeypatch.setattr(scoring, "weights_path", lambda run: run / "settings.json")
    provenance = bulk._provenance(run, ())
    filesystem = fsspec.filesystem("memory")
    job = bulk.Job(table, "memory://out", filesystem, str(run), (), n_gpus=0, provenance=provenance, n_parts=1)
    report = bulk.PartWriter(job)(rows.append_column("part", pyarrow.array([0] * 6)))
    assert asked == ["a", "b", "c"]
    assert report.select(["rows", "distinct"]).to_pylist() == [{"rows": 6, "distinct": 3}]
    lines = filesystem.cat_file(job.path(0)).decode().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["text", *texts]


def test_what_can_not_be_done_is_told_before_it_begins(ray, run, server, ollama_host, tmp_path, monkeypatch):
    options = {"model_dir": str(run), "hosts": [ollama_host]}
    with pytest.raises(UserError, match="no such file"):
        bulk.run(str(tmp_path / "none"), str(tmp_path / "out"), **options)
    source = tmp_path / "a.csv"
    source.write_text("id,text,label\n1,x,\n")
    with pytest.raises(UserError, match="would be added: label"):
        bulk.run(str(source), str(tmp_path / "out"), **options)
    source.write_text("id,words\n1,some words\n")
    with pytest.raises(UserError, match=r"no column text \(there are: id, words\)"):
        bulk.run(str(source), str(tmp_path / "out"), **options)
    bulk.run(str(source), str(tmp_path / "out"), text_column="words", **options)
    was = source.stat()
    source.write_text("id,words\n1,same words\n")  # as long as it was, and as old
    os.utime(source, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert source.stat().st_size == was.st_size
    with pytest.raises(UserError, match="begun with another input"):
        bulk.run(str(source), str(tmp_path / "out"), text_column="words", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not ours")
    with pytest.raises(UserError, match="is not empty"):
        bulk.run(str(source), str(tmp_path / "full"), text_column="words", **options)


def test_lines_that_are_no_json_and_half_characters_are_rows_too(ray, run, server, ollama_host, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(
        '{"text": "\\ud800", "n": [1]}\n{"text": 5}\nno json\n{"n": {"m": 2.50}, "text": "good morning"}\n'
    )
    bulk.run(str(source), str(tmp_path / "out"), model_dir=str(run), hosts=[ollama_host])
    (part,) = (tmp_path / "out").glob("part-*")
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert len(rows) == 4
    good = [row for row in rows if not row["error"]]
    assert [(row["text"], row.get("n")) for row in good] == [(5, None), ("good morning", {"m": 2.5})]
    assert {"line": "no json"}.items() <= next(row for row in rows if "line" in row).items()


def test_what_a_worker_fails_of_is_told(ray, run, stand_in, tmp_path):
    """A host that answers nonsense once the run has begun."""
    stand_in.body = b"{}"
    source = tmp_path / "a.csv"
    source.write_text("text\nsome text\n")
    with pytest.raises(UserError, match=r"Ollama's answer holds no label probabilities.*goes on"):
        bulk.run(str(source), str(tmp_path / "out"), model_dir=str(RUN), hosts=[stand_in.host])


@pytest.fixture
def bucket(monkeypatch) -> str:
    """An empty bucket of moto's server, which speaks as S3 does."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "any", "secret": "any", "endpoint_url": f"http://{host}:{port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    fsspec.filesystem("s3").mkdir("comments")
    yield "s3://comments"
    server.stop()


def test_a_bucket_is_read_and_a_fresh_prefix_of_it_written(ray, run, server, ollama_host, bucket):
    s3, options = fsspec.filesystem("s3"), {"model_dir": str(run), "hosts": [ollama_host]}
    s3.pipe_file("comments/in/a.csv", b"id,text\n001,thank you\n")
    s3.pipe_file("comments/in/b.csv", b"id,text\n002,some text\n")
    state = bulk.run(f"{bucket}/in", f"{bucket}/new/prefix", **options)
    assert (state["finished"], sum(state["rows"])) == (True, 2)
    parts = [s3.cat_file(path).decode() for path in s3.glob("comments/new/prefix/part-*")]
    assert sorted(line[:3] for part in parts for line in part.splitlines()[1:]) == ["001", "002"]
    s3.pipe_file("comments/in/b.csv", b"id,text\n002,same text\n")  # of the same length: its ETag is another
    with pytest.raises(UserError, match="begun with another input"):
        bulk.run(f"{bucket}/in", f"{bucket}/new/prefix", **options)
    with pytest.raises(UserError, match="no such file"):
        bulk.run(f"{bucket}/none", f"{bucket}/other", **options)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.csv": b'id,text\n1,a\n2,"b\n3,c\n'}, r"a.csv, line 3: a quote that opens in this row is not closed"),
        (
            {"a.jsonl": b'{"text": "a"}\n{"text": "b", "score": 412}\n'},
            r"a.jsonl, line 2 has columns that would be added",
        ),
        ({"a.csv": b"id,text\n1,a\n", "b.csv": b"id,body\n2,b\n"}, r"b.csv: no column text"),
    ],
)
def test_what_can_not_be_read_is_named_before_anything_is_computed(
    ray, run, server, ollama_host, tmp_path, files, reason
):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        bulk.run(str(tmp_path), str(tmp_path / "out"), model_dir=str(run), hosts=[ollama_host])
    assert not list(tmp_path.glob("out/part-*"))


def test_rows_that_can_not_be_read_keep_their_fields(ray, run, server, ollama_host, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(b"id,text\n007,caf\xe9\n008,a, b\n009,thank you\n")
    (tmp_path / "in" / "b.csv").write_bytes(b"id,text,posted\n010,thanks,2024-01-05T10:00:00\n")
    (tmp_path / "in" / "c.csv").write_bytes(b"")
    bulk.run(str(tmp_path / "in"), str(tmp_path / "out"), model_dir=str(run), hosts=[ollama_host], prefix="m_")
    lines = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("out/part-*"))).split(b"\n")
    assert lines[0].startswith(b"id,text,posted,m_label,m_p_hate")
    found = {line[:3]: line for line in lines[1:] if line}
    assert found[b"007"].startswith(b"007,caf\xe9,,,")
    assert b"not UTF-8" in found[b"007"]
    assert found[b"008"].startswith(b'008,"a, b",,,') or found[b"008"].startswith(b'008,"a, b"')
    assert b"3 fields, where the header has 2" in found[b"008"]
    assert found[b"010"].startswith(b"010,thanks,2024-01-05T10:00:00,")


@pytest.mark.slow
@pytest.mark.parametrize("n_texts", [250, pytest.param(1000, marks=pytest.mark.long)])
def test_many_texts_get_the_services_answers(run, server, n_texts):
    texts = pd.concat([pd.read_parquet(TEST), pd.read_parquet(TRAIN)])["text"].drop_duplicates()
    texts = texts[texts.str.len() <= 120][:n_texts].tolist()  # short, to save time: tests/benchmarks/bulk.py takes any
    calibration = Calibration.load(run / "calibration.json")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.classify, texts))
    served = calibration.apply(np.array([answer.probabilities for answer in answers]))
    scored = calibration.apply(scoring.load(run, calibration).label_probabilities(texts))
    agree = (served.argmax(axis=1) == scored.argmax(axis=1)).mean()
    apart = np.abs(served - scored)
    print(f"labels agree on {agree:.1%} of {len(texts)} texts; probabilities differ by {apart.mean():.4f} on average")
    assert agree >= 0.995
    assert apart.mean() < 0.01
    assert apart.max() < 0.06


def command(source, output, run, address: str) -> list[str]:
    options = ["--model-dir", str(run), "--address", address, "--workers", "2", "--rows-per-part", "8"]
    return [sys.executable, "-m", "hatespeech.cli", "bulk", str(source), str(output), *options]


def wait_for(parts: int, output, process) -> None:
    for _ in range(2400):
        if len(list(output.glob("part-*"))) >= parts:
            return
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.1)
    raise AssertionError(f"no {parts} parts came")


@pytest.mark.long
def test_kill_9_of_the_driver_then_of_a_node_loses_no_row_and_doubles_none(run, tmp_path):
    """A cluster of two nodes on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 150_000_000}
    soon = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = node | {"include_dashboard": False, "_system_config": soon}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    texts = pd.read_parquet(TRAIN)["text"].drop_duplicates()[:84].tolist()
    rows = pd.DataFrame({"id": range(112), "text": (texts + texts)[:112]})
    (tmp_path / "in").mkdir()
    for number in range(4):
        rows[number::4].to_parquet(tmp_path / "in" / f"{number}.parquet")
    output, environment = tmp_path / "out", os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    try:
        driver = subprocess.Popen(command(tmp_path / "in", output, run, cluster.address), **arguments)
        wait_for(2, output, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        first = {path.name for path in output.glob("part-*")}
        driver = subprocess.Popen(command(tmp_path / "in", output, run, cluster.address), **arguments)
        wait_for(len(first) + 1, output, driver)
        raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        _, errors = driver.communicate(timeout=400)
        assert driver.returncode == 0, errors[-2000:]
    finally:
        cluster.shutdown()
    found = written(output, ".parquet")
    assert found["id"].tolist() == rows["id"].tolist()
    assert found["label"].isin(task.LABELS).all()
    assert found.groupby("text")["p_hate"].nunique().max() == 1
    n_parts = len(list(output.glob("part-*")))
    print(f"{len(found)} rows once each in {n_parts} parts; {len(first)} when the driver was killed")
    assert len(first) < n_parts
    assert not list(output.glob("_[0-9a-f]*"))
