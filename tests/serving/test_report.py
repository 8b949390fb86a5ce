"""What the report and the review ask of the log, on SQLite and on a real PostgreSQL."""

import csv
import io
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import numpy as np
import pytest
from alembic import command
from sqlalchemy import create_engine, event, func, insert, make_url, select

from hatespeech import UserError, task
from hatespeech.serving import queries, reporting, store
from hatespeech.serving.queries import Filter, Span
from hatespeech.serving.store import ANSWERED, FAILED, Store, Tally
from tests.conftest import RUN

DAY = datetime(2026, 3, 1)
SPAN = Span(DAY, DAY + timedelta(days=30))


@pytest.fixture
def clock(monkeypatch):
    """clock(time): what the log takes the time to be."""
    return lambda time: monkeypatch.setattr(store, "now", lambda: time)


@pytest.fixture
def log(database_url) -> Store:
    return Store(database_url)


def add(log: Store, text: str, hate: float, score: float = 0.0, digest: str = "d" * 64, **changes) -> str:
    """An answered request with P(Hate) = hate and the rest Supportive."""
    request_id = log.received(text.encode(), "model")
    known = {"status": ANSWERED, "http_status": 200, "duration_ms": 100.0, "model_digest": digest}
    decided = {"probabilities": (hate, 0.0, 1 - hate), "score": score, "abstain": max(hate, 1 - hate) < 0.6}
    log.finished(request_id, **(known | decided | changes))
    return request_id


def test_figures_of_a_time_range_and_of_a_model(log, clock):
    clock(DAY)
    for _ in range(3):
        add(log, "same", 0.9, duration_ms=100)
    add(log, "other", 0.55, duration_ms=1000)
    clock(DAY + timedelta(days=1))
    add(log, "third", 0.2, digest="e" * 64, duration_ms=1000)
    broken = log.received(b"lost", "model")
    log.finished(broken, status=FAILED, http_status=503, duration_ms=10.0, error="Ollama is not there")
    clock(DAY + timedelta(days=40))
    add(log, "later", 0.9)

    found = reporting.report(log, SPAN, None)
    assert (found["requests"], found["answered"], found["not_answered"]) == (6, 5, {"failed": 1})
    assert found["labels"] == {"Hate": 4, "Neutral": 0, "Supportive": 1}
    assert found["abstained_share"] == 0.2
    assert found["latency_ms"]["median"] == pytest.approx(100, rel=0.05)
    assert found["latency_ms"]["p95"] == pytest.approx(1000, rel=0.05)
    assert [step["requests"] for step in found["over_time"]] == [4, 2]
    assert [(each["n"], each["label"], each["text"]) for each in found["repeated_texts"]] == [(3, "Hate", "same")]
    assert {each["model_digest"][0]: each["answered"] for each in found["models"]} == {"d": 4, "e": 1}
    of_one = reporting.report(log, Span(SPAN.since, SPAN.until, "e" * 64), None)
    assert (of_one["requests"], of_one["labels"]["Supportive"]) == (1, 1)
    hours = reporting.report(log, Span(DAY, DAY + timedelta(days=2)), None)
    assert hours["by"] == "hour"
    assert json.loads(json.dumps(found)) == found


def test_agreement_counts_the_newest_feedback_and_what_was_undone_not(log, clock):
    clock(DAY)
    right, wrong, undone, scored = (add(log, text, 0.9) for text in "abcd")
    log.add_feedback(right, "Neutral", None, None, None)
    log.add_feedback(right, "Hate", None, None, None)
    log.add_feedback(wrong, "Supportive", None, None, None)
    log.add_feedback(undone, "Neutral", None, None, None)
    log.add_feedback(undone, None, None, "undone", None)
    log.add_feedback(scored, None, 2.0, None, None)
    found = reporting.report(log, SPAN, None)["feedback"]
    assert (found["agreed"], found["judged"], found["agreement"]["value"]) == (2, 3, 0.6667)
    assert found["agreement"]["low"] == pytest.approx(0.2077, abs=1e-3)  # statsmodels' proportion_confint(2, 3, wilson)
    assert {request.id for request, _ in log.newest_feedback()} == {right, wrong, scored}
    assert queries.count(log, Filter(decided="open")) == 1
    said = {request.id: label for request, label in queries.least_sure(log, Filter(decided="done"), limit=9)}
    assert said == {right: "Hate", wrong: "Supportive", scored: "Hate"}


def test_the_review_shows_the_least_sure_first_and_what_the_filter_says(log, clock):
    clock(DAY)
    ids = [add(log, f"text {k} über", hate, score=hate) for k, hate in enumerate((0.9, 0.5, 0.7, 0.2))]
    log.received(b"never answered", "model")
    order = [request.id for request, _ in queries.least_sure(log, Filter(), limit=9)]
    assert order == [ids[1], ids[2], ids[3], ids[0]]
    (first, _), (second, _) = queries.least_sure(log, Filter(), limit=2)
    assert queries.least_sure(log, Filter(), (first.confidence, first.id))[0][0].id == second.id

    def shown(**chosen) -> set[int]:
        return {ids.index(request.id) for request, _ in queries.least_sure(log, Filter(**chosen), limit=9)}

    assert shown(label="Supportive") == {3}
    assert shown(low=0.6) == {0, 2}
    assert shown(low=0.3, high=0.8) == {1, 2}
    assert shown(words="TEXT 2") == {2}
    assert shown(words='"2" OR text; DROP') == set()  # words, not a query language
    assert shown(words="über") == {0, 1, 2, 3}
    assert shown(since=DAY + timedelta(days=1)) == set()
    assert shown(until=DAY) == set()
    exported = list(queries.exported(log, Filter(words="2")))
    assert exported[0][0] == ids[2]
    assert exported[0][2] == "text 2 über"


def test_purged_texts_are_found_no_more_and_their_counts_stay(log, clock):
    clock(DAY)
    add(log, "gone", 0.9)
    clock(DAY + timedelta(days=9))
    add(log, "stays", 0.9)
    queries.roll_up(log)
    assert log.purge(timedelta(days=5)) == 1
    assert queries.count(log, Filter(words="gone")) == 0
    assert queries.count(log, Filter(words="stays")) == 1
    assert reporting.report(log, SPAN, None)["answered"] == 2


def test_hours_are_counted_once_they_are_over_and_the_open_one_as_it_is(log, clock):
    def counted() -> int:
        with log.reading() as session:
            return session.scalar(select(func.coalesce(func.sum(Tally.n), 0)).where(Tally.measure == "outcome"))

    def reported() -> int:
        return reporting.report(log, SPAN, None)["requests"]

    for minutes in (10, 50, 70, 130):
        clock(DAY + timedelta(minutes=minutes))
        add(log, "some text", 0.7)
    assert (reported(), counted()) == (4, 3)  # two hours are over
    add(log, "some text", 0.7)
    assert (reported(), counted()) == (5, 3)
    clock(DAY + timedelta(minutes=181))  # over, but what was finished at its end may not be committed yet
    assert (reported(), counted()) == (5, 3)
    clock(DAY + timedelta(minutes=183))
    assert (reported(), counted()) == (5, 5)
    assert (reported(), counted()) == (5, 5)
    only_first = reporting.report(log, Span(DAY, DAY + timedelta(hours=1)), None)
    assert only_first["requests"] == 2


def test_two_that_count_at_once_count_once(log, clock):
    for hour in range(30):
        clock(DAY + timedelta(hours=hour))
        add(log, "some text", 0.7)
    clock(DAY + timedelta(days=3))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: queries.roll_up(log), range(4)))
    assert reporting.report(log, SPAN, None)["requests"] == 30


def test_a_log_of_18b38e9_opens_and_keeps_its_rows_and_counts(database_url, clock):
    """Its tables are those of the baseline; its counts are of each request as it was finished."""
    url = make_url(database_url)
    engine = create_engine(url)
    with engine.begin() as connection:
        command.upgrade(store.migrations(connection), "0003")
        hour = datetime.now(UTC).replace(tzinfo=None, minute=0, second=0, microsecond=0)
        for number, time in enumerate((DAY, DAY + timedelta(minutes=5), hour)):
            known = {"status": "answered", "text": "old text", "confidence": 0.6, "model": "m", "prompt_version": "p"}
            known |= {"received_at": time, "finished_at": time, "label": "Hate" if number else "Neutral"}
            connection.execute(insert(store.Request.__table__), known | {"id": f"old{number}"})
        for time, label in ((DAY, "Neutral"), (DAY, "Hate"), (hour, "Hate")):
            counted = {"hour": time, "model_digest": "", "measure": "outcome", "bin": label, "n": 1}
            connection.execute(insert(Tally.__table__), counted)
    engine.dispose()
    log = Store(database_url)
    assert {row.id for row in log.latest()} == {"old0", "old1", "old2"}
    assert queries.count(log, Filter(words="old")) == 3
    found = reporting.report(log, Span(DAY, hour + timedelta(hours=1)), None)
    assert found["labels"] == {"Hate": 2, "Neutral": 1, "Supportive": 0}
    add(log, "old news", 0.9)
    assert queries.count(log, Filter(words="old")) == 4


def test_a_log_too_old_to_be_read_says_what_to_do(tmp_path):
    with sqlite3.connect(tmp_path / "old.sqlite3") as connection:
        connection.execute("CREATE TABLE requests (id VARCHAR)")
    with pytest.raises(UserError, match="open it once with commit 18b38e9"):
        Store(f"sqlite:///{tmp_path}/old.sqlite3")


def test_a_purge_deletes_in_small_transactions(log, clock, monkeypatch):
    monkeypatch.setattr(store, "PURGED_AT_ONCE", 3)
    clock(DAY)
    for number in range(8):
        log.add_feedback(add(log, f"text {number}", 0.9), "Hate", None, None, None)
    clock(DAY + timedelta(days=9))
    add(log, "stays", 0.9)
    begun = []
    event.listen(log.engine, "begin", begun.append)
    assert log.purge(timedelta(days=5)) == 8
    assert len(begun) == 3
    assert [row.text for row in log.latest()] == ["stays"]


def test_an_export_holds_no_connection_between_its_pages(log, clock):
    clock(DAY)
    ids = [add(log, f"text {number}", 0.5 + number % 3 / 10) for number in range(7)]
    rows = queries.exported(log, Filter(), page=2)
    found = [next(rows)]
    assert log.readers.pool.checkedout() == 0
    add(log, "one more meanwhile", 0.99)
    found += list(rows)
    assert {row[0] for row in found} >= set(ids)
    assert len(found) == 8
    confidences = [row[queries.EXPORTED.index("confidence")] for row in found]
    assert confidences == sorted(confidences)


def test_the_index_is_that_of_the_textbook():
    """Two equal buckets against 3 to 1: (0.75 - 0.5) ln(0.75 / 0.5) + (0.25 - 0.5) ln(0.25 / 0.5) = 0.2747."""
    even, uneven = np.array([5e6, 5e6]), np.array([7.5e6, 2.5e6])
    assert reporting.population_stability_index(even, uneven) == pytest.approx(0.2747, abs=1e-4)
    assert reporting.population_stability_index(even, even) == 0


def test_drift_is_dated(log, clock):
    """Three days of scores like the test comments', then two of another kind."""
    reference = reporting.load_reference(RUN)
    assert reference["comments"] == reference["labels"].total() == 1892
    assert set(reference["labels"]) <= set(task.LABELS)
    assert reporting.load_reference(RUN / "none") is None
    rng, bins = np.random.default_rng(0), list(reference["bins"].elements())
    for day in range(5):
        clock(DAY + timedelta(days=day))
        for _ in range(120):
            score = (rng.choice(bins) + 0.5) / store.SCORE_BINS if day < 3 else rng.uniform(-3, -2)
            add(log, "x", 0.2, score=score)
    drift = reporting.report(log, SPAN, reference)["drift"]
    assert drift["since"] == "2026-03-04"
    assert drift["sentence"].startswith("Drifted since 2026-03-04: ")
    assert [row["index"] > reporting.PSI_DRIFTED for row in drift["by_day"]] == [False] * 3 + [True] * 2
    before = reporting.report(log, Span(DAY, DAY + timedelta(days=3)), reference)["drift"]
    assert before["since"] is None
    assert sum(row["answers"] for row in before["scores"]) == 360
    assert sum(row["reference"] for row in before["scores"]) == 1892
    few = reporting.report(log, Span(DAY - timedelta(days=2), DAY), reference)["drift"]
    assert "too few to tell" in few["sentence"]


def test_what_is_no_time_or_label_is_refused(client):
    for path in ("/report.json?since=yesterday", "/report?since=2026-01-02&until=2026-01-01", "/review?label=Nice"):
        assert client.get(path).status_code == 400
    for path in ("/review?after=x,y", "/review?low=nan", "/review?high=inf", "/review.csv?low=x", "/review?words=%00"):
        assert client.get(path).status_code == 400
    for path in ("/report?until=9999-12-31T23:59:59-23:59", "/report.json?since=0001-01-01", "/report.json?model=%00"):
        assert client.get(path).status_code == 400
    long = "/review?" + urlencode({"words": '"' * 5000 + "a" * 20_000, "decided": "all"})
    assert client.get(long).status_code == 200
    assert client.get("/report.json?since=2026-01-01T00:00%2B01:00").get_json()["since"] == "2025-12-31T23:00:00"


def test_a_decision_sent_from_another_site_is_refused(client):
    request_id = client.post("/infer", json={"text": "some text"}).get_json()["id"]
    sent = {"data": {"id": request_id, "label": "Hate"}}
    assert client.post("/review", **sent, headers={"Origin": "https://elsewhere.example"}).status_code == 403
    assert client.post("/file", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/review", **sent, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303


FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\r=1+1", "'=1+1", "plain")


def test_what_a_spreadsheet_takes_for_a_formula_is_made_none_in_the_export_for_people(client):
    for text in FORMULAS:
        assert client.post("/infer", json={"text": text}).status_code == 200
    export = client.get("/review.csv?decided=all")
    texts = {row["text"] for row in csv.DictReader(io.StringIO(export.text, newline=""))}
    assert texts == {text if text[0] in "'p" else f"'{text}" for text in FORMULAS}
    assert "apostrophe" in export.headers["X-Formulas"]
    raw = client.get("/review.csv?decided=all&raw=1")
    assert {row["text"] for row in csv.DictReader(io.StringIO(raw.text, newline=""))} == set(FORMULAS)
    assert "apostrophe" in client.get("/review").text  # who exports by hand is told
