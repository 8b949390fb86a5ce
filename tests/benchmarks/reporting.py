"""The report and the review on a log of a million requests, in SQLite and PostgreSQL.

    python -m tests.benchmarks.reporting                # minutes, 2 GB of disk; writes results/benchmarks/ too
    python -m tests.benchmarks.reporting --rows 2000    # prints only

Rows are made: texts of train.parquet, 30 days, two models, random answers, feedback on one in 200. Each figure is the
median of five calls, but `first_report_s`: that of the first one, which counts all hours. `from_rows` is what a report
would do without counts by hour: the same labels, latencies and scores, grouped by SQL over the rows; `ratio` is that
against the whole report.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from sqlalchemy import func, insert, select, text
from tqdm import tqdm

from hatespeech import runs, task
from hatespeech.serving import queries, reporting
from hatespeech.serving.queries import Filter, Span
from hatespeech.serving.store import ANSWERED, Feedback, Request, Store
from hatespeech.training import recording
from tests.conftest import RUN, TRAIN, postgres_server

DAY, DAYS, CHUNK = datetime(2026, 3, 1), 30, 20_000


def fill(store: Store, n_rows: int) -> None:
    """A log of n_rows answered requests."""
    rng, texts = np.random.default_rng(0), pd.read_parquet(TRAIN)["text"].tolist()
    for start in tqdm(range(0, n_rows, CHUNK), desc=f"filling {store.engine.dialect.name}", unit="chunk"):
        rows = []
        for number in range(start, min(start + CHUNK, n_rows)):
            probabilities = rng.dirichlet([1.0, 0.7, 1.2]).tolist()
            which = int(rng.integers(len(texts)))
            at = DAY + timedelta(days=DAYS * number / n_rows)
            row = {
                "received_at": at,
                "finished_at": at,
                "status": ANSWERED,
                "model_digest": ("a" if number < n_rows / 2 else "b") * 64,
                "label": task.decide(probabilities),
                "abstain": max(probabilities) < 0.5,
                "score": 1.8 * probabilities[0] - 0.3 * probabilities[1] - 2.6 * probabilities[2],
                "duration_ms": float(rng.lognormal(4.9, 0.4)),
            }
            named = zip(("p_hate", "p_neutral", "p_supportive"), probabilities, strict=True)
            asked = {"id": f"{rng.integers(2**62):032x}", "text": texts[which], "text_key": f"{which:016x}"}
            known = {"model": "hatespeech", "prompt_version": task.PROMPT_VERSION, "http_status": 200}
            rows.append(row | dict(named) | asked | known | {"confidence": max(probabilities)})
        said = [{"request_id": row["id"], "received_at": DAY, "label": "Hate"} for row in rows[::200]]
        with store.engine.begin() as connection:
            connection.execute(insert(Request.__table__), rows)
            connection.execute(insert(Feedback.__table__), said)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def from_rows(store: Store) -> None:
    day = func.date(Request.received_at)
    bins = (Request.label, func.round(Request.score * 4), func.round(Request.duration_ms / 10))
    with store.reading() as session:
        for column in bins:
            session.execute(
                select(day, Request.model_digest, column, func.count()).group_by(day, Request.model_digest, column)
            ).all()


def median_s(call: Callable[[], object], times: int = 5) -> float:
    measured = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        measured.append(time.perf_counter() - started)
    return round(statistics.median(measured), 4)


def size_bytes(store: Store) -> int:
    sizes = {"sqlite": "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"}
    sizes["postgresql"] = "SELECT pg_database_size(current_database())"
    with store.reading() as session:
        return session.execute(text(sizes[store.engine.dialect.name])).scalar_one()


def measure(store: Store) -> dict:
    span, reference = Span(DAY, DAY + timedelta(days=DAYS)), reporting.load_reference(RUN)
    first = median_s(lambda: reporting.report(store, span, reference), 1)  # counts all hours
    report = median_s(lambda: reporting.report(store, span, reference))
    whole = median_s(lambda: from_rows(store), 1)
    one_model = Span(span.since, span.until, "a" * 64)
    return {
        "database": store.engine.dialect.name,
        "first_report_s": first,
        "report_s": report,
        "report_of_one_model_s": median_s(lambda: reporting.report(store, one_model, reference)),
        "repeated_texts_s": median_s(lambda: queries.repeated(store, span)),
        "from_rows_s": whole,
        "ratio": round(whole / report, 1),
        "review_s": median_s(lambda: (queries.least_sure(store, Filter()), queries.count(store, Filter()))),
        "review_of_words_s": median_s(lambda: queries.least_sure(store, Filter(words="black women"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="requests in the log; a million is stored")
    arguments = parser.parse_args()
    result = {
        "command": "python -m tests.benchmarks.reporting",
        "commit": recording.commit(),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores",
        "versions": {"python": sys.version.split()[0]},
        "requests": arguments.rows,
        "rows": [],
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(postgres_server()).replace("postgresql:", "postgresql+psycopg:")
        for where in (f"sqlite:///{folder}/log.sqlite3", url):
            store = Store(where)
            fill(store, arguments.rows)
            size = {"bytes_a_request": round(size_bytes(store) / arguments.rows)}
            result["rows"].append(measure(store) | size)
            store.engine.dispose()
    print(json.dumps(result, indent=2))
    if arguments.rows >= 1_000_000:
        runs.write_json(RUN.parent / "benchmarks" / "reporting.json", result)


if __name__ == "__main__":
    main()
