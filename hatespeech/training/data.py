"""Rows of every kind -> comments -> splits that do not leak.

Measuring Hate Speech (Kennedy et al. 2020, Sachdeva et al. 2022; CC-BY-4.0) has one row per annotator and about
3.4 annotators per comment; the score is the same in every row of a comment. A split by row puts the same text on both
sides.

    python -m hatespeech.training.data published.csv --hashes tests/data/dynahate.sha256 --output dynahate.csv
"""

import argparse
import csv
import hashlib
import math
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from hatespeech import UserError, tables, task
from hatespeech.normal import normal_form
from hatespeech.tables import Table

HUB_ID = "ucberkeley-dlab/measuring-hate-speech"
# What is known of a comment's class: its score (and so its class), its class, or only that it is not Hate.
KINDS = ("score", "class", "not_hate")
# As people write them in a `label` column, in lower case, with neither blanks nor signs.
_LABEL_NAMES = {label.lower(): label for label in task.LABELS} | {"nothate": task.NOT_HATE}
_FLAGS = dict.fromkeys(("1", "1.0", "true", "yes"), "Hate") | dict.fromkeys(("0", "0.0", "false", "no"), task.NOT_HATE)


def read(source: str) -> pd.DataFrame:
    """Annotation rows from a CSV, JSONL or Parquet file, or from a Hugging Face hub id.

    A row has a text and one of hate_speech_score (a number), label (Hate, Neutral, Supportive; or Not hate, nothate)
    and hateful (1 or 0). comment_id tells which rows are of one comment; without it, the text does.

    Raises UserError: no such file or hub data set, hub unreachable, not a table, a required column missing.
    """
    if is_file(source):
        rows = _frame(tables.open_table(source))
    else:
        import datasets

        try:
            rows = datasets.load_dataset(source, split="train").to_pandas()
        except FileNotFoundError as error:
            kinds = ", ".join(tables.KINDS)
            raise UserError(f"{source}: no such data set: give a file of {kinds}, or a hub id ({error})") from error
        except OSError as error:
            raise UserError(
                f"{source}: can't be fetched from the Hugging Face hub ({type(error).__name__}). "
                "Check the network, or give the rows as a local file: --dataset rows.csv"
            ) from error
        except ValueError as error:  # its words quote rows, so only the kind is said
            raise UserError(f"{source}: can't be read as a table ({type(error).__name__})") from error
    there_are = f"(there are: {', '.join(map(str, rows.columns))})"
    if "text" not in rows:
        raise UserError(f"{source}: no column text {there_are}")
    if not {"hate_speech_score", "label", "hateful"} & set(rows.columns):
        raise UserError(f"{source}: no column hate_speech_score, label or hateful {there_are}")
    return rows


def is_file(source: str) -> bool:
    """Whether a source is meant as a file or folder, and not as a hub id."""
    return "://" in source or tables.ending_of(source) is not None or Path(source).exists()


def _frame(table: Table) -> pd.DataFrame:
    """A table's rows, each cell as it stands in the file: an id 007 is no number, and a text may be the word null.

    A row that can't be read has no text. What was wrong with such rows is said.
    """
    frames, errors = [], []
    for rows in table.batches():
        if table.kind == "parquet":
            own = rows.select(range(len(table.columns))).rename_columns(table.columns)
            frame = own.to_pandas(integer_object_nulls=True)  # as floats, long ids would lose their last digits
        else:
            own = [rows[f"c{number}"].to_pylist() for number in range(max(1, len(table.columns)))]
            cells = [[cell.decode("utf-8", "surrogatepass") for cell in column] for column in own]
            if table.kind == "csv":
                frame = pd.DataFrame(dict(zip(table.columns, cells, strict=True)), dtype=object)
            else:
                frame = pd.DataFrame([tables.json_object(line) for line in cells[0]], dtype=object)
        frames.append(frame.assign(**{table.text_column: rows["text"].to_pylist()}))
        found = zip(rows["line"].to_pylist(), rows["error"].to_pylist(), strict=True)
        errors += [f"line {line}: {error}" for line, error in found if error]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        print(f"{', '.join(table.files)}: left out, {'; '.join(errors[:3])}{more}", file=sys.stderr)
    if not frames:
        raise UserError(f"{', '.join(table.files)}: no rows")
    return pd.concat(frames, ignore_index=True)


@dataclass
class Comments:
    """One row per comment, and what became of the rows that were read.

    frame: comment_id (str), text, label (of task.LABELS, or task.NOT_HATE where no more is known), score (float, NaN
    where it is not known), kind (of KINDS), n_annotations, group (texts alike but for case, spacing, punctuation, links
    and mentions share one); and, of optional columns, targets and answers, as annotated() gives them, else empty.
    counts: what was read, left out and merged, for the run's report.
    """

    frame: pd.DataFrame
    counts: dict[str, int] = field(default_factory=dict)


def comments(rows: pd.DataFrame, count_tokens=None) -> Comments:
    """Merge rows into comments; count what can't be used, never drop it silently.

    count_tokens: list of texts -> list of prompt lengths; with it, texts over task.CONTEXT_TOKENS are left out, as the
    service refuses them.
    """
    text = rows["text"].astype("string").fillna("").astype(object)
    score, label = _column(rows, "hate_speech_score").map(_number), _labels(rows)
    label = label.where(score.isna(), score.map(task.label_of, na_action="ignore"))
    no_text = ~text.map(normal_form).astype(bool)
    no_label = label.isna() & ~no_text
    ids = _column(rows, "comment_id") if "comment_id" in rows else text.map(text_key)
    no_id = ids.eq("") & ~no_text & ~no_label
    usable = ~(no_text | no_label | no_id)
    kept = pd.DataFrame({"comment_id": ids, "text": text, "score": score, "label": label})[usable]
    by_comment = kept.groupby("comment_id", sort=False)
    frame = by_comment.agg(
        text=("text", "first"),
        score=("score", "mean"),
        label=("label", lambda labels: labels.mode()[0])
        if kept["comment_id"].duplicated().any()
        else ("label", "first"),
        n_annotations=("text", "size"),
        n_texts=("text", "nunique"),
        n_labels=("label", "nunique"),
    ).reset_index()
    frame["label"] = frame["label"].where(frame["score"].isna(), frame["score"].map(task.label_of, na_action="ignore"))
    frame["kind"] = [
        "score" if math.isfinite(score) else "not_hate" if label == task.NOT_HATE else "class"
        for score, label in zip(frame["score"], frame["label"], strict=True)
    ]
    frame = with_annotations(frame, rows[usable].assign(comment_id=kept["comment_id"]))
    counts = {
        "rows": len(rows),
        "rows_without_text": int(no_text.sum()),
        "rows_without_label": int(no_label.sum()),
        "rows_without_comment_id": int(no_id.sum()),
        "comments_whose_rows_differ_in_text": int((frame.pop("n_texts") > 1).sum()),
        "comments_whose_rows_differ_in_label": int((frame.pop("n_labels") > 1).sum()),
    }
    if count_tokens is not None:
        fits = pd.Series(count_tokens(frame["text"].tolist()), index=frame.index) <= task.CONTEXT_TOKENS
        counts["comments_too_long"] = int((~fits).sum())
        frame = frame[fits].reset_index(drop=True)
    frame["group"] = pd.factorize(frame["text"].map(_likeness))[0]
    counts |= {
        "comments": len(frame),
        "comments_like_another": int(frame["group"].duplicated(keep=False).sum()),
        "comments_with_control_tokens": int((frame["text"] != frame["text"].map(task.spell_out)).sum()),
        **{f"comments_whose_{kind}_is_known": int((frame["kind"] == kind).sum()) for kind in KINDS},
        **{f"comments_{label}": int((frame["label"] == label).sum()) for label in (*task.LABELS, task.NOT_HATE)},
    }
    return Comments(frame, counts)


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    """A column as it is written, without outer blanks; empty where there is nothing, or no such column."""
    if name not in rows:
        return pd.Series("", index=rows.index, dtype=object)
    return rows[name].map(_written).astype(object)


def _written(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def _number(written: str) -> float:
    try:
        value = float(written)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _labels(rows: pd.DataFrame) -> pd.Series:
    """Of `label`, else of `hateful`, what they say: of task.LABELS, task.NOT_HATE, or None."""
    named = _column(rows, "label").map(lambda name: _LABEL_NAMES.get("".join(filter(str.isalpha, name.lower()))))
    flagged = _column(rows, "hateful").map(lambda flag: _FLAGS.get(flag.lower()))
    return named.where(named.notna(), flagged)


def with_annotations(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The comments with what rows of MHS's schema tell of them, by comment_id, which must be strings in both.

    targets: names of the `target_*` groups that at least half of the annotators saw. answers: each annotator's own
    answer to `hatespeech` (0 no, 1 unclear, 2 yes). Both are empty tuples where the rows do not tell.
    """
    rows = rows.assign(comment_id=rows["comment_id"].map(_written))
    rows = rows[rows["comment_id"].isin(frame["comment_id"])]
    columns = [name for name in rows.columns if name.startswith("target_")]
    names = [name.removeprefix("target_").replace("_", ": ", 1).replace("_", " ") for name in columns]
    unseen = ("nan", "none", "", "false", "0", "0.0", "<na>")
    seen = rows[columns].map(lambda flag: str(flag).casefold() not in unseen)
    shares = seen.groupby(rows["comment_id"]).mean() >= 0.5
    targets = {
        comment: tuple(name for name, flag in zip(names, flags, strict=True) if flag)
        for comment, flags in zip(shares.index, shares.to_numpy(), strict=True)
    }
    answers = (
        _column(rows, "hatespeech").map(_number).groupby(rows["comment_id"]).agg(lambda each: tuple(each.dropna()))
    )
    answers = answers.to_dict()
    return frame.assign(
        targets=[targets.get(comment, ()) for comment in frame["comment_id"]],
        answers=[answers.get(comment, ()) for comment in frame["comment_id"]],
    )


def text_key(text: str) -> str:
    """What names a text without telling it: 16 hex digits of its sha256, whatever blanks are in it.

    Not of its normal form, whose rules may change: an id must not.
    """
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _likeness(text: str) -> str:
    """Equal for texts that differ only in case, spacing, punctuation, links and mentions. An emoji may turn a text into
    its opposite, so it counts as a word does."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    words = ["".join(filter(_means_something, word)) for word in words if not word.startswith(("http", "@"))]
    return " ".join(filter(None, words)) or text


def _means_something(c: str) -> bool:
    return c.isalnum() or unicodedata.category(c) == "So"


def split(frame: pd.DataFrame, shares: dict[str, float], seed: int) -> tuple[dict[str, pd.DataFrame], int]:
    """Divide comments, e.g. by {"train": 0.8, "validation": 0.1, "test": 0.1}; no group is on two sides.

    All but train are drawn from the comments of which most is known: those with a score, where they hold all classes,
    else those with a class, else all. Classes keep their shares: groups are drawn stratified by their first comment's
    label. Returns the parts, and how many comments are in none: unlike those they are like, they can't measure.
    Raises UserError where a class has too few comments to be on every side.
    """
    from sklearn.model_selection import train_test_split

    measuring = _measuring(frame)
    groups = frame[measuring].groupby("group")["label"].first()
    rest, parts, left = groups, {}, 1.0
    for name, share in shares.items():
        if name == "train":
            continue
        try:
            taken, rest = train_test_split(rest, train_size=share / left, stratify=rest, random_state=seed)
        except ValueError as error:
            sizes = ", ".join(f"{label} {n}" for label, n in groups.value_counts().items())
            raise UserError(f"too few distinct comments to split into {', '.join(shares)}: {sizes}") from error
        left -= share
        parts[name] = frame[measuring & frame["group"].isin(taken.index)].reset_index(drop=True)
    held_out = frame["group"].isin(groups.index.difference(rest.index))
    parts = {"train": frame[~held_out].reset_index(drop=True)} | parts
    for name, part in parts.items():
        require_classes(part, name)
    return parts, len(frame) - sum(map(len, parts.values()))


def _measuring(frame: pd.DataFrame) -> pd.Series:
    for kinds in (("score",), ("score", "class")):
        known = frame["kind"].isin(kinds)
        if set(frame.loc[known, "label"]) == set(task.LABELS):
            return known
    return pd.Series(True, index=frame.index)


def without(frame: pd.DataFrame, others: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The comments that share neither id nor likeness with any of others, and how many were left out."""
    seen = frame["comment_id"].isin(others["comment_id"]) | frame["text"].map(_likeness).isin(
        others["text"].map(_likeness)
    )
    return frame[~seen].reset_index(drop=True), int(seen.sum())


def require_classes(frame: pd.DataFrame, name: str) -> None:
    """UserError where Hate, or all that is not Hate, has no comment: nothing could be learned or said about it."""
    hate = frame["label"] == "Hate"
    for what, some in (("Hate", hate), ("Neutral, Supportive or Not hate", ~hate)):
        if not some.any():
            raise UserError(
                f"the {name} comments hold no {what} (a score > {task.HATE_ABOVE} is Hate, "
                f"< {task.SUPPORTIVE_BELOW} Supportive, else Neutral): check the labels, or give more rows"
            )


def targets(frame: pd.DataFrame, score_error: float):
    """(n, 4) what to learn of each comment: weights of log P(Hate), log P(Neutral), log P(Supportive) and
    log P(Neutral or Supportive), which sum to 1.

    A score is known up to a normal error of standard deviation score_error, on its own scale; a class without a score
    gets what the scored comments of its class have on average; Not hate is the fourth. score_error 0: hard labels.
    """
    import numpy as np
    from scipy.stats import norm

    goals = np.zeros((len(frame), 4))
    names = (*task.LABELS, task.NOT_HATE)
    goals[np.arange(len(frame)), [names.index(label) for label in frame["label"]]] = 1
    scored = (frame["kind"] == "score").to_numpy()
    if score_error == 0 or not scored.any():
        return goals
    scores, labels = frame["score"].to_numpy(dtype=float)[scored], frame["label"].to_numpy()
    hate = norm.sf(task.HATE_ABOVE, scores, score_error)
    supportive = norm.cdf(task.SUPPORTIVE_BELOW, scores, score_error)
    soft = np.stack([hate, 1 - hate - supportive, supportive], axis=1)
    for label in task.LABELS:
        if (labels[scored] == label).any():
            goals[~scored & (labels == label), :3] = soft[labels[scored] == label].mean(axis=0)
    goals[scored, :3] = soft
    return goals


def fingerprint(frame: pd.DataFrame) -> str:
    """sha256 over comment ids, texts, scores and labels, in order: the same for the same data, however stored."""
    digest = hashlib.sha256()
    for row in frame[["comment_id", "text", "score", "label"]].itertuples(index=False):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def pick(published: Path, hashes: Path, output: Path) -> tuple[int, int]:
    """Copy those rows of a published CSV whose text is on a list of text_key's, as text and hateful (1 or 0).

    For a data set whose rows may be used and not passed on: the Dynamically Generated Hate Speech set (Vidgen et al.
    2021; columns text, label). Returns how many rows were found, and how many texts are on the list.
    """
    wanted = set(hashes.read_text().split())
    frame = comments(read(str(published))).frame
    found = frame.assign(key=frame["text"].map(text_key)).drop_duplicates("key")
    found = found[found["key"].isin(wanted)].sort_values("key")  # in one order, however the file is sorted
    with open(output, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "hateful"])
        writer.writerows(zip(found["text"], (found["label"] == "Hate").astype(int), strict=True))
    return len(found), len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hatespeech.training.data", description=pick.__doc__)
    parser.add_argument("published", type=Path, help="the CSV as published, e.g. of the hub's aps/dynahate")
    parser.add_argument("--hashes", type=Path, required=True, help="tests/data/dynahate.sha256 or dynahate_dev.sha256")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    arguments = parser.parse_args()
    try:
        found, wanted = pick(arguments.published, arguments.hashes, arguments.output)
    except (UserError, OSError) as error:
        sys.exit(f"data: {error}")
    print(f"{arguments.output}: {found} of {wanted} listed texts")
    if found < wanted:
        print("the others are not in this file: is it the whole of the published set?", file=sys.stderr)


if __name__ == "__main__":
    main()
