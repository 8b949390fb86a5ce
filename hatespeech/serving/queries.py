"""What the report and the review ask of the log. Besides store.py the only module that knows SQL."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, case, cast, func, select, text, tuple_
from sqlalchemy.types import String

from hatespeech import task
from hatespeech.serving.store import Feedback, Request, Store, Tally

# The newest feedback on a request, as a label; of a score alone, its class; null where there is none or it was undone.
_SAID = case(
    (Feedback.label.is_not(None), Feedback.label),
    (Feedback.score > task.HATE_ABOVE, "Hate"),
    (Feedback.score < task.SUPPORTIVE_BELOW, "Supportive"),
    (Feedback.score.is_not(None), "Neutral"),
)
SAID = (
    select(_SAID)
    .where(Feedback.request_id == Request.id)
    .order_by(Feedback.id.desc())
    .limit(1)
    .correlate(Request)
    .scalar_subquery()
)


@dataclass(frozen=True)
class Span:
    """A time range, and the model whose answers count; all of them where it is empty."""

    since: datetime
    until: datetime
    model_digest: str = ""


def tallies(store: Store, span: Span, by: str) -> list[tuple[datetime, str, str, str, int]]:
    """(start, model_digest, measure, bin, n) of each hour or day (by) within the span, which takes in whole hours."""
    start = Tally.hour if by == "hour" else func.date(Tally.hour)
    asked = select(start.label("start"), Tally.model_digest, Tally.measure, Tally.bin, func.sum(Tally.n))
    asked = asked.where(Tally.hour >= span.since.replace(minute=0, second=0, microsecond=0), Tally.hour < span.until)
    if span.model_digest:
        asked = asked.where(Tally.model_digest == span.model_digest)
    asked = asked.group_by("start", Tally.model_digest, Tally.measure, Tally.bin).order_by("start")
    with store.reading() as session:
        return [(datetime.fromisoformat(str(first)), *rest) for first, *rest in session.execute(asked)]


def _within(span: Span) -> tuple:
    """Conditions on the time. Not on the bare column: SQLite would begin with all rows of the time, by their index."""
    received_at = func.coalesce(Request.received_at, Request.received_at)
    return received_at >= span.since, received_at < span.until


def repeated(store: Store, span: Span, limit: int = 10) -> list[dict]:
    """The texts that came most often, of whichever model: {"id", "n", "label", "text"}, the newest of each."""
    asked = select(Request.text_key, func.count().label("n"), func.max(Request.received_at))
    asked = asked.where(*_within(span), Request.text_key.is_not(None)).group_by(Request.text_key)
    asked = asked.having(func.count() > 1).order_by(func.count().desc(), Request.text_key).limit(limit)
    found = []
    with store.reading() as session:
        for key, n, newest in session.execute(asked).all():
            same = select(Request).where(Request.text_key == key, Request.received_at == newest).limit(1)
            request = session.scalars(same).one()
            found.append({"id": request.id, "n": n, "label": request.label, "text": request.text})
    return found


def agreement(store: Store, span: Span) -> tuple[int, int]:
    """Of the answers that people said something of: on how many they agree, and how many these are."""
    newest = select(func.max(Feedback.id)).group_by(Feedback.request_id)
    rows = select(Request.label, _SAID.label("said")).select_from(Feedback).join(Request)
    rows = rows.where(Feedback.id.in_(newest), Request.label.is_not(None), *_within(span))
    if span.model_digest:
        rows = rows.where(Request.model_digest == span.model_digest)
    rows = rows.subquery()
    asked = select(func.sum(case((rows.c.label == rows.c.said, 1), else_=0)), func.count(rows.c.said))
    with store.reading() as session:
        agreed, n = session.execute(asked).one()
    return int(agreed or 0), n


@dataclass(frozen=True)
class Filter:
    """Which answers a person wants to see. decided: open (without feedback), done, or all."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    since: datetime | None = None
    until: datetime | None = None
    words: str = ""
    decided: str = "open"

    def apply(self, store: Store, asked: Select) -> Select:
        asked = asked.where(Request.text.is_not(None), Request.confidence.is_not(None))  # it has one, it was answered
        if self.label:
            asked = asked.where(Request.label == self.label)
        if self.low is not None:
            asked = asked.where(Request.score >= self.low)
        if self.high is not None:
            asked = asked.where(Request.score <= self.high)
        if self.since:
            asked = asked.where(Request.received_at >= self.since)
        if self.until:
            asked = asked.where(Request.received_at < self.until)
        if self.words.strip():
            asked = asked.where(_matches(store, self.words))
        if self.decided != "all":
            asked = asked.where(SAID.is_(None) if self.decided == "open" else SAID.is_not(None))
        return asked


def _matches(store: Store, words: str):
    """All the words, in any order: https://www.sqlite.org/fts5.html, PostgreSQL's plainto_tsquery."""
    if store.engine.dialect.name == "sqlite":
        quoted = " ".join('"{}"'.format(word.replace('"', '""')) for word in words.replace("\0", " ").split())
        found = "SELECT request_id FROM searchable WHERE number IN (SELECT rowid FROM request_texts(:words))"
        return Request.id.in_(text(found).bindparams(words=quoted).columns(Request.id))
    document = func.to_tsvector(text("'simple'"), func.left(Request.text, text("50000")))
    return document.op("@@")(func.plainto_tsquery(text("'simple'"), words.replace("\0", " ")))


def least_sure(
    store: Store, chosen: Filter, after: tuple[float, str] | None = None, limit: int = 1
) -> list[tuple[Request, str | None]]:
    """Answers and what people said of them, the least sure first. after: (confidence, id) of the last one seen."""
    asked = chosen.apply(store, select(Request, SAID))
    if after:
        asked = asked.where(tuple_(Request.confidence, Request.id) > after)
    with store.reading() as session:
        return [tuple(row) for row in session.execute(asked.order_by(Request.confidence, Request.id).limit(limit))]


def count(store: Store, chosen: Filter, at_most: int = 1000) -> int:
    """How many answers the filter shows; no more than at_most are counted."""
    some = chosen.apply(store, select(Request.id)).limit(at_most).subquery()
    with store.reading() as session:
        return session.scalar(select(func.count()).select_from(some))


EXPORTED = ("id", "received_at", "text", "label", "p_hate", "p_neutral", "p_supportive", "score", "confidence")


def exported(store: Store, chosen: Filter) -> Iterator[tuple]:
    """Rows of EXPORTED and `feedback`, the least sure first, read in batches."""
    columns = [
        cast(getattr(Request, name), String) if name == "received_at" else getattr(Request, name) for name in EXPORTED
    ]
    asked = chosen.apply(store, select(*columns, SAID)).order_by(Request.confidence, Request.id)
    with store.reading() as session:
        yield from (tuple(row) for row in session.execute(asked.execution_options(yield_per=1000)))
