"""What the report and the review ask of the log. Besides store.py the only module that knows SQL."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Select, and_, case, cast, func, insert, or_, select, text, true, tuple_, update
from sqlalchemy.orm import Session
from sqlalchemy.types import String

from hatespeech import task
from hatespeech.serving import store as log
from hatespeech.serving.store import Feedback, Request, RolledUp, Store, Tally, tallies_of, tally_rows

# The newest feedback on a request, as a label; of a score alone, its class; null where there is none or it was undone.
_FEEDBACK_LABEL = case(
    (Feedback.label.is_not(None), Feedback.label),
    (Feedback.score > task.HATE_ABOVE, "Hate"),
    (Feedback.score < task.SUPPORTIVE_BELOW, "Supportive"),
    (Feedback.score.is_not(None), "Neutral"),
)
NEWEST_FEEDBACK = (
    select(_FEEDBACK_LABEL)
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


_COUNTED = (
    *(Request.finished_at, Request.status, Request.model_digest),
    *(Request.label, Request.abstain, Request.score, Request.duration_ms),
)
# An outcome's time is taken a moment before it is committed: an hour is over when no more can come.
_SETTLED = timedelta(minutes=2)


def roll_up(store: Store) -> None:
    """Count the requests of each hour that is over and not counted yet. Whoever asks for a report does it.

    Two may do it at once: of each hour, one is the first.
    """
    until = log.hour_of(log.now() - _SETTLED)
    mark = _rolled_up_until(store)
    if mark >= until:
        return
    hour, counts, n_requests = None, Counter(), 0
    with store.reading() as session:
        asked = select(*_COUNTED).where(Request.finished_at >= mark, Request.finished_at < until)
        for row in session.execute(asked.order_by(Request.finished_at).execution_options(yield_per=10_000)):
            keys = tallies_of(*row)
            if hour is not None and keys[0][0] > hour:
                if not _store_hour(store, mark, hour + timedelta(hours=1), counts):
                    return
                mark, counts = hour + timedelta(hours=1), Counter()
            hour = keys[0][0]
            counts.update(keys)
            n_requests += 1
            if n_requests % 100_000 == 0:
                print(f"counting for the report: {n_requests:,} requests, up to {hour}", file=sys.stderr, flush=True)
    _store_hour(store, mark, until, counts)


def _rolled_up_until(store: Store) -> datetime:
    with store.reading() as session:
        return session.scalar(select(RolledUp.until))


def _store_hour(store: Store, mark: datetime, until: datetime, counts: Counter) -> bool:
    """Keep the counts of the time from mark to until; False where another process was the first."""
    with Session(store.engine) as session, session.begin():
        moved = session.execute(update(RolledUp).where(RolledUp.until == mark).values(until=until))
        if moved.rowcount and counts:
            session.execute(insert(Tally), tally_rows(counts))
        return bool(moved.rowcount)


def tallies(store: Store, span: Span) -> Counter[tuple[datetime, str, str, str]]:
    """How many requests of the span, which takes in whole hours, had what in common, by the keys of store.tallies_of.

    Hours that roll_up has counted, and the others' requests as they are now.
    """
    since = log.hour_of(span.since)
    mark = _rolled_up_until(store)  # what was counted up to here stays as it is, whoever goes on counting
    counted = select(Tally).where(Tally.hour >= since, Tally.hour < min(mark, span.until))
    live = select(*_COUNTED).where(Request.finished_at >= max(mark, since), Request.finished_at < span.until)
    if span.model_digest:
        counted = counted.where(Tally.model_digest == span.model_digest)
        live = live.where(Request.model_digest == span.model_digest)
    with store.reading() as session:
        found = Counter({(t.hour, t.model_digest, t.measure, t.bin): t.n for t in session.scalars(counted)})
        for row in session.execute(live.execution_options(yield_per=10_000)):
            found.update(tallies_of(*row))
    return found


def _in_time(span: Span) -> tuple:
    """Conditions on the time. Not on the bare column: SQLite would begin with all rows of the time, by their index."""
    received_at = func.coalesce(Request.received_at, Request.received_at)
    return received_at >= span.since, received_at < span.until


def repeated(store: Store, span: Span, limit: int = 10) -> list[dict]:
    """The texts that came most often, of whichever model: {"id", "n", "label", "text"}, the newest of each."""
    asked = select(Request.text_key, func.count().label("n"), func.max(Request.received_at))
    asked = asked.where(*_in_time(span), Request.text_key.is_not(None)).group_by(Request.text_key)
    asked = asked.having(func.count() > 1).order_by(func.count().desc(), Request.text_key).limit(limit)
    found = []
    with store.reading() as session:
        for key, n, newest in session.execute(asked).all():
            same = select(Request).where(Request.text_key == key, Request.received_at == newest).limit(1)
            request = session.scalars(same).first()
            if request is None:  # purged meanwhile
                continue
            found.append({"id": request.id, "n": n, "label": request.label, "text": request.text})
    return found


def agreement(store: Store, span: Span) -> tuple[int, int]:
    """Of the answers that people said something of: on how many they agree, and how many these are."""
    newest = select(func.max(Feedback.id)).group_by(Feedback.request_id)
    rows = select(Request.label, _FEEDBACK_LABEL.label("corrected")).select_from(Feedback).join(Request)
    rows = rows.where(Feedback.id.in_(newest), Request.label.is_not(None), *_in_time(span))
    if span.model_digest:
        rows = rows.where(Request.model_digest == span.model_digest)
    rows = rows.subquery()
    not_hate = and_(rows.c.corrected == task.NOT_HATE, rows.c.label != "Hate")
    agrees = or_(rows.c.label == rows.c.corrected, not_hate)
    asked = select(func.sum(case((agrees, 1), else_=0)), func.count(rows.c.corrected))
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
        asked = asked.where(Request.text.is_not(None), Request.confidence.is_not(None))  # answers alone have one
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
            asked = asked.where(NEWEST_FEEDBACK.is_(None) if self.decided == "open" else NEWEST_FEEDBACK.is_not(None))
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
    asked = chosen.apply(store, select(Request, NEWEST_FEEDBACK))
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


def exported(store: Store, chosen: Filter, page: int = 1_000) -> Iterator[tuple]:
    """Rows of EXPORTED and `feedback`, the least sure first.

    Read page by page, each after the last row of the one before: however slow the reader, no connection waits for it.
    """
    columns = [
        cast(getattr(Request, name), String) if name == "received_at" else getattr(Request, name) for name in EXPORTED
    ]
    asked = chosen.apply(store, select(*columns, NEWEST_FEEDBACK)).order_by(Request.confidence, Request.id).limit(page)
    after = None
    while True:
        with store.reading() as session:
            place = tuple_(Request.confidence, Request.id) > after if after else true()
            rows = [tuple(row) for row in session.execute(asked.where(place))]
        yield from rows
        if len(rows) < page:
            return
        after = (rows[-1][EXPORTED.index("confidence")], rows[-1][EXPORTED.index("id")])
