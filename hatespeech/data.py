"""Annotation rows -> comments -> splits that do not leak.

Measuring Hate Speech (Kennedy et al. 2020, Sachdeva et al. 2022; CC-BY-4.0) has one row an annotator and about 3.4
annotators a comment; the score is the same in every row of a comment. A split by row puts the same text on both sides.
"""

import functools
import hashlib
import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from hatespeech import UserError, task

HUB_ID = "ucberkeley-dlab/measuring-hate-speech"
REQUIRED_COLUMNS = ("comment_id", "text", "hate_speech_score")
_READERS = {
    ".csv": pd.read_csv,
    ".jsonl": functools.partial(pd.read_json, lines=True, dtype={"comment_id": str, "text": str}),
    ".parquet": pd.read_parquet,
}


def read(source: str) -> pd.DataFrame:
    """Annotation rows from a CSV, JSONL or Parquet file, or from a Hugging Face hub id.

    Raises UserError: no such file or hub data set, hub unreachable, not a table, a required column missing.
    """
    path = Path(source)
    try:
        if reader := _READERS.get(path.suffix):
            rows = reader(path)
        elif path.exists():
            raise UserError(f"{source}: a data set is a {' or '.join(_READERS)} file, or a hub id such as {HUB_ID}")
        else:
            import datasets

            rows = datasets.load_dataset(source, split="train").to_pandas()
    except FileNotFoundError as error:
        raise UserError(
            f"{source}: no such data set: give a {' or '.join(_READERS)} file, or a hub id ({error})"
        ) from error
    except OSError as error:
        raise UserError(
            f"{source}: can't be fetched from the Hugging Face hub ({type(error).__name__}). "
            "Check the network, or give the rows as a local file: --dataset rows.csv"
        ) from error
    except ValueError as error:  # pandas' and pyarrow's parser errors; their texts quote rows, so only the kind is said
        raise UserError(f"{source}: can't be read as a table ({type(error).__name__})") from error
    missing = [column for column in REQUIRED_COLUMNS if column not in rows]
    if missing:
        raise UserError(f"{source}: no column {', '.join(missing)} (there are: {', '.join(map(str, rows.columns))})")
    return rows


@dataclass
class Comments:
    """One row a comment, and what became of the annotation rows.

    frame: comment_id (str), text, score (float), label, n_annotations, group (texts alike but for case, spacing,
    punctuation, links and mentions share one); and, of optional columns, vote (the annotators' mean answer to
    `hatespeech`, 0 to 1), agreement (the share of them that gave the commonest answer), else NaN, and targets (names of
    the `target_*` groups that at least half of them saw), else empty.
    counts: what was read, left out and merged, for the run's report.
    """

    frame: pd.DataFrame
    counts: dict[str, int] = field(default_factory=dict)


def comments(rows: pd.DataFrame, count_tokens=None) -> Comments:
    """Merge annotation rows into comments; count what can't be used, never drop it silently.

    count_tokens: list of texts -> list of prompt lengths; with it, texts over task.CONTEXT_TOKENS are left out, as the
    service refuses them.
    """
    text = rows["text"].astype("string").fillna("")
    score = pd.to_numeric(rows["hate_speech_score"], errors="coerce")
    no_text = text.str.strip().eq("")
    no_score = ~score.map(math.isfinite) & ~no_text
    no_id = rows["comment_id"].isna() & ~no_text & ~no_score
    usable = ~(no_text | no_score | no_id)
    kept = pd.DataFrame({"comment_id": rows["comment_id"].astype(str), "text": text, "score": score})[usable]
    frame = kept.groupby("comment_id", sort=False).agg(
        text=("text", "first"), score=("score", "mean"), n_annotations=("score", "size"), n_texts=("text", "nunique")
    )
    frame = frame.reset_index()
    kept_rows = rows[usable].assign(comment_id=kept["comment_id"])
    frame = frame.join(_votes(kept_rows), on="comment_id").join(_targets(kept_rows), on="comment_id")
    counts = {
        "rows": len(rows),
        "rows_without_text": int(no_text.sum()),
        "rows_without_finite_score": int(no_score.sum()),
        "rows_without_comment_id": int(no_id.sum()),
        "comments_whose_rows_differ_in_text": int((frame.pop("n_texts") > 1).sum()),
    }
    if count_tokens is not None:
        fits = pd.Series(count_tokens(frame["text"].tolist()), index=frame.index) <= task.CONTEXT_TOKENS
        counts["comments_too_long"] = int((~fits).sum())
        frame = frame[fits].reset_index(drop=True)
    frame["label"] = frame["score"].map(task.label_of)
    frame["group"] = pd.factorize(frame["text"].map(_likeness))[0]
    counts |= {
        "comments": len(frame),
        "comments_like_another": int(frame["group"].duplicated(keep=False).sum()),
        "comments_with_control_tokens": int((frame["text"] != frame["text"].map(task.spell_out)).sum()),
        **{f"comments_{label}": int((frame["label"] == label).sum()) for label in task.LABELS},
    }
    return Comments(frame, counts)


def _votes(rows: pd.DataFrame) -> pd.DataFrame:
    """vote and agreement by comment_id."""
    if "hatespeech" not in rows:
        return pd.DataFrame({"vote": float("nan"), "agreement": float("nan")}, index=rows["comment_id"].unique())
    answers = rows.groupby(["comment_id", "hatespeech"]).size().groupby("comment_id")
    vote = rows.groupby("comment_id")["hatespeech"].mean() / 2  # 0 no, 1 unclear, 2 yes
    return pd.DataFrame({"vote": vote, "agreement": answers.max() / answers.sum()})


def _targets(rows: pd.DataFrame) -> pd.Series:
    """targets by comment_id. Of the columns, target_race and its like; target_race_asian and its like are too few."""
    columns = [name for name in rows.columns if name.startswith("target_") and name.count("_") == 1]
    seen = rows[columns].map(lambda flag: str(flag).casefold() not in ("nan", "none", "", "false", "0", "0.0", "<na>"))
    share = seen.groupby(rows["comment_id"]).mean().to_numpy() >= 0.5
    names = [name.removeprefix("target_") for name in columns]
    found = [tuple(name for name, flag in zip(names, flags, strict=True) if flag) for flags in share]
    return pd.Series(found, index=sorted(rows["comment_id"].unique()), name="targets", dtype=object)


def _likeness(text: str) -> str:
    """Equal for texts that differ only in case, spacing, punctuation, links and mentions."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    words = ["".join(filter(str.isalnum, word)) for word in words if not word.startswith(("http", "@"))]
    return " ".join(filter(None, words)) or text


def split(frame: pd.DataFrame, shares: dict[str, float], seed: int) -> dict[str, pd.DataFrame]:
    """Divide comments, e.g. by {"train": 0.8, "validation": 0.1, "test": 0.1}; no group is on two sides.

    Classes keep their shares: groups are drawn stratified by their first comment's label.
    Raises UserError where a class has too few comments to be on every side.
    """
    from sklearn.model_selection import train_test_split

    groups = frame.groupby("group")["label"].first()
    rest, parts, left = groups, {}, 1.0
    for name, share in shares.items():
        if share / left > 1 - 1e-9:
            taken, rest = rest, rest[:0]
        else:
            try:
                taken, rest = train_test_split(rest, train_size=share / left, stratify=rest, random_state=seed)
            except ValueError as error:
                sizes = ", ".join(f"{label} {(groups == label).sum()}" for label in task.LABELS)
                raise UserError(f"too few distinct comments to split into {', '.join(shares)}: {sizes}") from error
        left -= share
        parts[name] = frame[frame["group"].isin(taken.index)].reset_index(drop=True)
    for name, part in parts.items():
        require_classes(part, name)
    return parts


def without(frame: pd.DataFrame, others: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The comments that share neither id nor likeness with any of others, and how many were left out."""
    seen = frame["comment_id"].isin(others["comment_id"]) | frame["text"].map(_likeness).isin(
        others["text"].map(_likeness)
    )
    return frame[~seen].reset_index(drop=True), int(seen.sum())


def require_classes(frame: pd.DataFrame, name: str) -> None:
    """UserError where a class has no comment: nothing could be learned or said about it."""
    empty = [label for label in task.LABELS if not (frame["label"] == label).any()]
    if empty:
        raise UserError(
            f"the {name} comments hold no {', '.join(empty)} (score > {task.HATE_ABOVE} is Hate, "
            f"< {task.SUPPORTIVE_BELOW} Supportive, else Neutral): check hate_speech_score, or give more rows"
        )


def soft_targets(scores, score_error: float):
    """Class probabilities of a score known up to a normal error of standard deviation score_error.

    scores: (n,) floats on MHS's scale; returns (n, 3) in task.LABELS' order. score_error 0 gives the hard labels.
    """
    import numpy as np
    from scipy.stats import norm

    scores = np.asarray(scores, dtype=float)
    if score_error == 0:
        return np.stack([[label == task.label_of(score) for label in task.LABELS] for score in scores]).astype(float)
    hate = norm.sf(task.HATE_ABOVE, scores, score_error)
    supportive = norm.cdf(task.SUPPORTIVE_BELOW, scores, score_error)
    return np.stack([hate, 1 - hate - supportive, supportive], axis=1)


def fingerprint(frame: pd.DataFrame) -> str:
    """sha256 over comment ids, texts and scores, in order: the same for the same data, however it was stored."""
    digest = hashlib.sha256()
    for row in frame[["comment_id", "text", "score"]].itertuples(index=False):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()
