"""How the service is doing: what /report shows and /report.json says, from the log's counts by hour."""

import csv
import math
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from hatespeech import task
from hatespeech.serving import queries
from hatespeech.serving.queries import Span
from hatespeech.serving.store import LATENCY_BINS, SCORE_BINS, Store, hour_of

# Rules of thumb from credit scoring, where the index comes from (Siddiqi 2006, Credit Risk Scorecards).
PSI_MODERATE, PSI_DRIFTED = 0.1, 0.25
# Fewer answers than this in a day say nothing about drift.
MIN_ANSWERS = 100
# Buckets of the reference, of about equal size.
N_BUCKETS = 8


def load_reference(run: Path) -> dict | None:
    """Expected scores and labels of the run's own test comments, from its predictions.csv: what traffic is held
    against. Not of its training comments: a model is surer of them than of what it has not seen.

    None where the run has no such file.
    """
    path = run / "predictions.csv"
    if not path.exists():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    names = {row["classifier"] for row in rows}
    classifier = "as_served" if "as_served" in names else "torch"
    rows = [row for row in rows if row["classifier"] == classifier]
    labels = Counter(task.decide([float(row[f"p_{label.lower()}"]) for label in task.LABELS]) for row in rows)
    bins = Counter(math.floor(float(row["expected_score"]) * SCORE_BINS) for row in rows)
    return {"comments": len(rows), "classifier": classifier, "labels": labels, "bins": bins}


def population_stability_index(expected: np.ndarray, found: np.ndarray) -> float:
    """sum((q - p) ln(q / p)) over buckets, half a case added to each, so that an empty one is finite.

    expected, found: (k,) counts.
    """
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (np.asarray(expected), np.asarray(found)))
    return float(((q - p) * np.log(q / p)).sum())


def report(store: Store, span: Span, reference: dict | None) -> dict:
    """All figures of a time range. Latencies are within 5 %, from bins of 9 %; times are UTC."""
    # Counts are of whole hours, and so is all that stands beside them.
    until = hour_of(span.until)
    until += timedelta(hours=1) * (until < span.until)
    span = replace(span, since=hour_of(span.since), until=until)
    by = "hour" if span.until - span.since <= timedelta(days=3) else "day"
    steps, days, models = (defaultdict(lambda: defaultdict(Counter)) for _ in range(3))
    total: dict[str, Counter] = defaultdict(Counter)
    queries.roll_up(store)
    for (hour, digest, measure, name), n in queries.tallies(store, span).items():
        day = hour.replace(hour=0)
        for counted in (steps[hour if by == "hour" else day], days[day], models[digest], total):
            counted[measure][name] += n
    agreed, judged = queries.agreement(store, span)
    return {
        "since": span.since.isoformat(),
        "until": span.until.isoformat(),
        "model_digest": span.model_digest or None,
        **_figures(total),
        "by": by,
        "over_time": [{"start": start.isoformat(), **_figures(steps[start])} for start in sorted(steps)],
        "drift": _drift(total, days, reference),
        "feedback": {"judged": judged, "agreed": agreed, "agreement": _share(agreed, judged)},
        "models": [{"model_digest": digest, **_figures(found)} for digest, found in models.items() if digest],
        "repeated_texts": queries.repeated(store, span),
    }


def _figures(measures: dict[str, Counter]) -> dict:
    outcomes = measures["outcome"]
    answered = sum(outcomes[label] for label in task.LABELS)
    return {
        "requests": outcomes.total(),
        "answered": answered,
        "labels": {label: outcomes[label] for label in task.LABELS},
        "not_answered": {name: n for name, n in sorted(outcomes.items()) if name not in task.LABELS},
        "abstained_share": round(measures["abstained"].total() / answered, 4) if answered else None,
        "latency_ms": {"median": _quantile(measures["latency"], 0.5), "p95": _quantile(measures["latency"], 0.95)},
    }


def _quantile(bins: Counter, q: float) -> float | None:
    """The middle of the bin that holds it, ms."""
    wanted, seen = q * bins.total(), 0
    for number in sorted(map(int, bins)):
        seen += bins[str(number)]
        if seen >= wanted:
            return round(2 ** ((number + 0.5) / LATENCY_BINS), 1)
    return None


def _drift(total: dict[str, Counter], days: dict[datetime, dict[str, Counter]], reference: dict | None) -> dict:
    if reference is None:
        return {"sentence": "The run's folder holds no predictions.csv to hold the traffic against."}
    edges = _edges(reference["bins"])
    expected = _bucketed(reference["bins"], edges)

    def index(measures: dict[str, Counter]) -> float | None:
        bins = Counter({int(name): n for name, n in measures["score"].items()})
        return None if bins.total() < MIN_ANSWERS else population_stability_index(expected, _bucketed(bins, edges))

    by_day = {day: index(days[day]) for day in sorted(days)}
    known = {day: value for day, value in by_day.items() if value is not None}
    whole, since = index(total), None
    for day, value in reversed(known.items()):
        if value <= PSI_DRIFTED:
            break
        since = day
    if not known:
        sentence = f"No day has {MIN_ANSWERS} answers: too few to tell whether the traffic has drifted."
    elif since:
        sentence = (
            f"Drifted since {since:%Y-%m-%d}: the scores are spread otherwise than on the model's test comments "
            f"(population stability index {known[max(known)]:.2f} on the last day; over {PSI_DRIFTED} is much)."
        )
    elif known[max(known)] > PSI_MODERATE:
        sentence = f"Moderate change: population stability index {known[max(known)]:.2f} on the last day."
    else:
        sentence = f"No drift: population stability index {known[max(known)]:.2f} on the last day."
    bins = Counter({int(name): n for name, n in total["score"].items()})
    return {
        "sentence": sentence,
        "since": since and since.date().isoformat(),
        "population_stability_index": whole and round(whole, 4),
        "by_day": [
            {"day": day.date().isoformat(), "index": value and round(value, 4)} for day, value in by_day.items()
        ],
        "reference": {"comments": reference["comments"], "labels": dict(reference["labels"])},
        "scores": [
            {"score": number / SCORE_BINS, "answers": bins[number], "reference": reference["bins"][number]}
            for number in range(
                min([*bins, *reference["bins"]], default=0), max([*bins, *reference["bins"]], default=-1) + 1
            )
        ],
    }


def _edges(bins: Counter) -> list[int]:
    """Numbers of score bins at which a new bucket of about equal size begins."""
    edges, seen, wanted = [], 0, bins.total() / N_BUCKETS
    for number in sorted(bins):
        if seen >= wanted * (len(edges) + 1):
            edges.append(number)
        seen += bins[number]
    return edges


def _bucketed(bins: Counter, edges: list[int]) -> np.ndarray:
    counts = np.zeros(len(edges) + 1)
    for number, n in bins.items():
        counts[np.searchsorted(edges, number, side="right")] += n
    return counts


def _share(part: int, whole: int) -> dict | None:
    """A share with its Wilson 95 % interval: https://www.itl.nist.gov/div898/handbook/prc/section2/prc241.htm."""
    if not whole:
        return None
    z, p = 1.96, part / whole
    middle, half = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole))
    low, high = ((middle + sign * half) / (1 + z * z / whole) for sign in (-1, 1))
    return {"value": round(p, 4), "low": round(low, 4), "high": round(high, 4)}
