"""Functional checks (short texts of known kinds, each with the right answer) and the gates a model must pass.

    python -m hatespeech.training.checks results/smollm2-135m    # which gates the run passed

The checks are tests/data/functional.csv, the gates results/gates.json: a list of {"metric", "at_least" or "at_most"},
a metric named as in metrics.json, e.g. test.accuracy or functional.worst_kind.
"""

import json
import sys
from pathlib import Path

from hatespeech import UserError, task

ROOT = Path(__file__).parents[2]
FUNCTIONAL = ROOT / "tests" / "data" / "functional.csv"
GATES = ROOT / "results" / "gates.json"
COLUMNS = ("id", "pair", "kind", "group", "text", "label")


def load(path: Path):
    """The checks as a frame of COLUMNS. Raises UserError where the file is none of checks."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as functional checks ({type(error).__name__})") from error
    if missing := [name for name in COLUMNS if name not in frame]:
        raise UserError(f"{path}: functional checks have the columns {', '.join(COLUMNS)}; {missing[0]} is missing")
    wrong = ~frame["label"].isin(task.LABELS)
    if wrong.any():
        raise UserError(f"{path}, line {wrong.idxmax() + 2}: a label is {', '.join(task.LABELS)}")
    return frame


def measure(frame, probabilities) -> dict:
    """How often the answers are right: Hate against the rest (accuracy_hate) and among all three (accuracy).

    probabilities: (n, 3), calibrated. Returns both with n and a 95 % interval, pairs (the share of pairs with both
    texts right, Hate against the rest), worst_kind and worst_group (the lowest accuracy_hate), and rows by kind and by
    group, the worst first.
    """
    from hatespeech.training import evaluation

    truth, decided = evaluation.numbers(frame["label"]), probabilities.argmax(axis=1)
    right_hate, right = (decided == evaluation.HATE) == (truth == evaluation.HATE), decided == truth

    def rows(column: str) -> list[dict]:
        found = []
        for name in sorted(set(frame[column]) - {""}):
            member = (frame[column] == name).to_numpy()
            hate, all_three = evaluation.rate(right_hate[member]), evaluation.rate(right[member])
            found.append({column: name, "accuracy_hate": hate, "accuracy": all_three})
        return sorted(found, key=lambda row: row["accuracy_hate"]["value"])

    kinds, groups = rows("kind"), rows("group")
    both = frame.assign(right=right_hate).groupby("pair")["right"].all()
    return {
        "accuracy_hate": evaluation.rate(right_hate),
        "accuracy": evaluation.rate(right),
        "pairs": evaluation.rate(both.to_numpy()),
        "worst_kind": kinds[0]["accuracy_hate"] if kinds else None,
        "worst_group": groups[0]["accuracy_hate"] if groups else None,
        "by_kind": kinds,
        "by_group": groups,
    }


def table(found: dict) -> str:
    """Markdown of measure's result."""

    def cell(rate: dict) -> str:
        return f"{rate['value']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"

    lines = ["| | n | Hate against the rest | of all three |", "| --- | ---: | --- | --- |"]
    all_checks = {"kind": "**all checks**"} | found
    for row in (all_checks, *found["by_kind"], *found["by_group"]):
        name = row.get("kind") or row["group"]
        n = row["accuracy_hate"]["n"]
        lines.append(f"| {name.replace('_', ' ')} | {n} | {cell(row['accuracy_hate'])} | {cell(row['accuracy'])} |")
    return "\n".join(lines)


def read_gates(path: Path) -> list[dict]:
    """The gates of a file. Raises UserError where they make no sense."""
    try:
        gates = json.loads(path.read_text())
        for gate in gates:
            (bound,) = gate.keys() - {"metric"}
            known = bound in ("at_least", "at_most") and isinstance(gate[bound], int | float)
            if not known or gate["metric"].count(".") != 1:
                raise ValueError
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f'{path}: a gate is {{"metric": "test.accuracy", "at_least": 0.6}}, or "at_most" ({type(error).__name__})'
        ) from error
    return gates


def passed(metrics: dict, engine: str, gates: list[dict]) -> list[dict]:
    """Each gate with what was reached, by metrics.json's figures of an engine, and whether it passed.

    A metric that was not measured did not pass.
    """
    results = []
    for gate in gates:
        part, _, name = gate["metric"].partition(".")
        reached = (metrics.get(part, {}).get(engine, {}).get(name) or {}).get("value")
        ok = reached is not None and gate.get("at_least", reached) <= reached <= gate.get("at_most", reached)
        results.append(gate | {"reached": reached, "passed": ok})
    return results


def sentence(result: dict) -> str:
    bound = f"at least {result['at_least']:g}" if "at_least" in result else f"at most {result['at_most']:g}"
    reached = "not measured" if result["reached"] is None else f"{result['reached']:.3f}"
    return f"{'passed' if result['passed'] else 'FAILED'}  {result['metric']}: {reached} ({bound} asked)"


def of_run(folder: Path) -> tuple[str, list[dict]]:
    """The engine a run was measured by last, and what it reached at its gates. UserError where nothing is stored."""
    path = folder / "metrics.json"
    try:
        gates = json.loads(path.read_text()).get("gates", {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} can't be read: this run was not measured") from error
    engine = next((name for name in ("as_served", "torch") if name in gates), None)
    if engine is None:
        raise UserError(f"{path} has no gates: python -m train --evaluate-only --output {folder}")
    return engine, gates[engine]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hatespeech.training.checks results/RUN")
    try:
        engine, results = of_run(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"checks: {error}")
    print(f"gates, {'as served' if engine == 'as_served' else 'as trained'}:")
    print("\n".join(f"  {sentence(result)}" for result in results))


if __name__ == "__main__":
    main()
