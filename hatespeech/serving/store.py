"""The log, feedback and API keys: SQLAlchemy 2 models, and all that is written (report and review read in queries.py).

A request is committed before Ollama is called and again before the answer leaves. SQLite by default, PostgreSQL by
its URL; several processes may share one database. Alembic brings an older database up to date at start.
"""

import hashlib
import hmac
import math
import os
import secrets
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from sqlalchemy import (
    ForeignKey,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from hatespeech import UserError, task

KEY_LENGTH = 16
RECEIVED, ANSWERED, REFUSED, FAILED, INTERRUPTED = "received", "answered", "refused", "failed", "interrupted"
# Rows deleted in one transaction: some ten milliseconds.
PURGED_AT_ONCE = 2_000
# Longer than any request can take: what another machine's process has left `received` for so long was interrupted.
_ABANDONED = timedelta(hours=1)


class Base(DeclarativeBase):
    pass


class Request(Base):
    """A text to be classified. Times are UTC without a zone, since SQLite keeps none.

    status: received (Ollama is being asked) -> answered, refused (the request's fault), failed (ours or Ollama's) or
    interrupted (the process died asking). text is what came, undecodable bytes as \\xNN; null if too large to read, or
    if LOG_TEXT says so. text_sha256 is the sha256 of its bytes, with LOG_TEXT=hash an HMAC-SHA256; text_key the first
    quarter of it, which tells texts apart in an index a quarter the size.
    """

    __tablename__ = "requests"

    id: Mapped[str] = mapped_column(primary_key=True)
    received_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    status: Mapped[str]
    http_status: Mapped[int | None]
    route: Mapped[str | None]
    api_key: Mapped[str | None]
    process: Mapped[str | None]
    text: Mapped[str | None]
    text_sha256: Mapped[str | None]
    text_key: Mapped[str | None]
    label: Mapped[str | None]
    p_hate: Mapped[float | None]
    p_neutral: Mapped[float | None]
    p_supportive: Mapped[float | None]
    score: Mapped[float | None]
    confidence: Mapped[float | None]
    abstain: Mapped[bool | None]
    duration_ms: Mapped[float | None]
    error: Mapped[str | None]
    model: Mapped[str]
    model_digest: Mapped[str | None]
    prompt_version: Mapped[str]
    calibration: Mapped[str | None]


# On the path of every request: built once, so that SQLAlchemy finds them compiled.
_RECEIVE = insert(Request.__table__)
_FINISH = update(Request.__table__).where(Request.__table__.c.id == bindparam("request_id"))


class Tally(Base):
    """How many requests that were finished within an hour had what in common, so that a report need not read them all.

    Counted once the hour is over, by whoever asks for a report first (queries.roll_up). measure and bin: tallies_of's.
    """

    __tablename__ = "tallies"

    hour: Mapped[datetime] = mapped_column(primary_key=True)
    model_digest: Mapped[str] = mapped_column(primary_key=True)
    measure: Mapped[str] = mapped_column(primary_key=True)
    bin: Mapped[str] = mapped_column(primary_key=True)
    n: Mapped[int]


class RolledUp(Base):
    """Up to where tallies are: one row. until: the hour that is not counted yet."""

    __tablename__ = "rolled_up"

    id: Mapped[int] = mapped_column(primary_key=True)
    until: Mapped[datetime]


SCORE_BINS, LATENCY_BINS = 4, 8  # a unit of the score; a doubling of the milliseconds


def tallies_of(
    finished_at: datetime,
    status: str,
    model_digest: str | None = None,
    label: str | None = None,
    abstain: bool | None = None,
    score: float | None = None,
    duration_ms: float | None = None,
) -> list[tuple[datetime, str, str, str]]:
    """Keys (hour, model_digest, measure, bin) of the tallies a finished request counts in.

    measure `outcome`: its bin is the label, or the status where there is none; `abstained`; `score`: the number of a
    bin of 1 / SCORE_BINS; `latency`: that of a bin of duration_ms, 9 % wide.
    """
    bins = [("outcome", label or status)]
    if label:
        bins += [("score", str(math.floor(score * SCORE_BINS)))] if score is not None else []
        if duration_ms is not None:
            bins += [("latency", str(math.floor(math.log2(max(duration_ms, 0.01)) * LATENCY_BINS)))]
        bins += [("abstained", "yes")] if abstain else []
    hour = hour_of(finished_at)
    return sorted((hour, model_digest or "", measure, name) for measure, name in bins)


def without_secrets(url: URL) -> str:
    """A database's address as it may be shown. The query may hold a password, and so may a host with an @ in it, of a
    password in which that was not escaped."""
    return url.drivername if "@" in (url.host or "") else url.set(query={}).render_as_string()


def hour_of(time: datetime) -> datetime:
    """The beginning of its hour."""
    return time.replace(minute=0, second=0, microsecond=0)


def tally_rows(counts: Mapping[tuple[datetime, str, str, str], int]) -> list[dict]:
    """Rows of Tally's table, of counts by the keys of tallies_of."""
    names = ("hour", "model_digest", "measure", "bin")
    return [dict(zip(names, key, strict=True), n=n) for key, n in counts.items()]


class Feedback(Base):
    """What a person says of an answer. Never overwritten: the newest counts. Neither label nor score: taken back."""

    __tablename__ = "feedback"

    id: Mapped[int] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"))
    received_at: Mapped[datetime]
    label: Mapped[str | None]
    score: Mapped[float | None]
    note: Mapped[str | None]
    api_key: Mapped[str | None]


class ApiKey(Base):
    """Who may ask from elsewhere. The key itself is shown once and kept as its sha256."""

    __tablename__ = "api_keys"

    name: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    scopes: Mapped[str]
    created_at: Mapped[datetime]


class Store:
    """The database behind a URL: sqlite:////var/lib/hatespeech/requests.sqlite3, postgresql+psycopg://host/name.

    Threads may share it. log_text: full | hash | none, what is kept of a text; hash_key: the HMAC's, for hash.
    engine writes; readers read, and never wait for a writer. Raises UserError where the database can't be opened.
    """

    def __init__(self, url: str, log_text: str = "full", hash_key: str = ""):
        self.log_text, self.hash_key = log_text, hash_key.encode()
        self.process = _process_name(os.getpid())
        location = _location(url)
        try:
            self._connect(location)
            _migrate(self.engine)
        except (SQLAlchemyError, ValueError, TypeError) as error:
            # The driver's first line tells what; its others, and SQLAlchemy's own words, may tell the password.
            reason = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
            reason = "its host holds an @" if "@" in (location.host or "") else reason
            raise UserError(f"DATABASE_URL: {without_secrets(location)} can't be opened: {reason}") from error
        self._mark_interrupted()

    def _connect(self, location) -> None:
        if location.get_backend_name() == "sqlite":
            _make_private(location.database)
            # SQLite has one writer at a time; a queue for one connection is fair where its own polling starves threads.
            self.engine = create_engine(location, pool_timeout=10, pool_size=1, max_overflow=0)
            self.readers = create_engine(location, pool_timeout=10, pool_size=4, max_overflow=4)
            for engine in (self.engine, self.readers):
                event.listen(engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            event.listen(self.readers, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        else:
            self.engine = create_engine(location, pool_timeout=10, pool_size=16, max_overflow=64)
            self.readers = self.engine

    def received(
        self,
        body: bytes | None,
        model: str,
        *,
        route: str | None = None,
        api_key: str | None = None,
        keep_text: bool = True,
    ) -> str:
        """Commit that a request came, and return its id. body: None where it was not read.

        keep_text: False where whoever sent it asked that it be forgotten; neither is its hash kept then.
        """
        if not keep_text:
            body = None
        kept = None if body is None or self.log_text != "full" else body.decode("utf-8", "backslashreplace")
        request_id, sha256 = uuid.uuid4().hex, self._hash(body)
        row = {
            "id": request_id,
            "received_at": now(),
            "status": RECEIVED,
            "route": route,
            "api_key": api_key,
            "process": self.process,
            # PostgreSQL's text holds no NUL; such a body is refused, and its row is spelled out.
            "text": kept and kept.replace("\0", r"\x00"),
            "text_sha256": sha256,
            "text_key": sha256 and sha256[:KEY_LENGTH],
            "model": model,
            "prompt_version": task.PROMPT_VERSION,
        }
        with self.engine.begin() as connection:
            connection.execute(_RECEIVE, row)
        return request_id

    def _hash(self, body: bytes | None) -> str | None:
        if body is None or self.log_text == "none":
            return None
        if self.log_text == "hash":
            return hmac.digest(self.hash_key, body, "sha256").hex()
        return hashlib.sha256(body).hexdigest()

    def finished(
        self,
        request_id: str,
        *,
        status: str,
        http_status: int,
        duration_ms: float,
        error: str | None = None,
        probabilities: Sequence[float] | None = None,
        score: float | None = None,
        abstain: bool | None = None,
        model_digest: str | None = None,
        calibration: str | None = None,
    ) -> None:
        """Commit what became of a request."""
        decided = {"label": None if probabilities is None else task.decide(probabilities)}
        if probabilities is not None:
            hate, neutral, supportive = probabilities
            decided |= {"p_hate": hate, "p_neutral": neutral, "p_supportive": supportive}
            decided |= {"score": score, "confidence": max(probabilities), "abstain": abstain}
        error = error and error.replace("\0", r"\x00")  # PostgreSQL's text holds no NUL
        outcome = {"status": status, "http_status": int(http_status), "error": error, "duration_ms": duration_ms}
        outcome |= {"finished_at": now(), "model_digest": model_digest, "calibration": calibration}
        with self.engine.begin() as connection:
            connection.execute(_FINISH, {"request_id": request_id, **outcome, **decided})

    def latest(self, limit: int = 20) -> list[Request]:
        """The newest requests, newest first."""
        with self.reading() as session:
            return list(session.scalars(select(Request).order_by(Request.received_at.desc()).limit(limit)))

    def answered(self, batch: int = 1000) -> Iterator[Request]:
        """All answered requests whose text was kept, oldest first, read in batches."""
        asked = select(Request).where(Request.status == ANSWERED, Request.text.is_not(None))
        with self.reading() as session:
            yield from session.scalars(asked.order_by(Request.received_at).execution_options(yield_per=batch))

    def add_feedback(
        self, request_id: str, label: str | None, score: float | None, note: str | None, api_key: str | None
    ) -> bool:
        """Keep feedback beside its request, if there is one: False where there is not."""
        note = note and note.replace("\0", r"\x00")
        with Session(self.engine) as session, session.begin():
            if "\0" in request_id or session.get(Request, request_id) is None:
                return False
            session.add(
                Feedback(request_id=request_id, received_at=now(), label=label, score=score, note=note, api_key=api_key)
            )
            return True

    def newest_feedback(self) -> Iterator[tuple[Request, Feedback]]:
        """Each request that has feedback and its text, with the newest of it."""
        newest = select(func.max(Feedback.id)).group_by(Feedback.request_id)
        pairs = select(Request, Feedback).join(Feedback).where(Feedback.id.in_(newest), Request.text.is_not(None))
        pairs = pairs.where(Feedback.label.is_not(None) | Feedback.score.is_not(None))
        with self.reading() as session:
            yield from (tuple(row) for row in session.execute(pairs.order_by(Feedback.id)))

    def purge(self, older_than: timedelta) -> int:
        """Delete requests, and their feedback, that came longer ago; return how many.

        In small transactions, between which the service writes. Of hours that are not counted yet nothing is deleted,
        so that their counts stay: count them first (queries.roll_up).
        """
        counted = select(RolledUp.until).scalar_subquery()
        over = or_(Request.finished_at < counted, Request.received_at < now() - max(older_than, timedelta(days=1)))
        old = select(Request.id).where(Request.received_at < now() - older_than, over).limit(PURGED_AT_ONCE)
        n_deleted = 0
        while True:
            with self.engine.begin() as connection:
                ids = list(connection.scalars(old))
                connection.execute(delete(Feedback).where(Feedback.request_id.in_(ids)))
                connection.execute(delete(Request).where(Request.id.in_(ids)))
            n_deleted += len(ids)
            if len(ids) < PURGED_AT_ONCE:
                return n_deleted
            time.sleep(0.01)  # the service's turn

    def create_key(self, name: str, scopes: Sequence[str]) -> str:
        """A new API key, or a new one in an old one's place; kept as its sha256 alone."""
        key = secrets.token_urlsafe(32)
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        with Session(self.engine) as session, session.begin():
            session.merge(ApiKey(name=name, sha256=sha256, scopes=" ".join(scopes), created_at=now()))
        return key

    def delete_key(self, name: str) -> bool:
        with self.engine.begin() as connection:
            return connection.execute(delete(ApiKey).where(ApiKey.name == name)).rowcount > 0

    def api_keys(self) -> list[ApiKey]:
        with self.reading() as session:
            return list(session.scalars(select(ApiKey).order_by(ApiKey.name)))

    def key_named(self, key: str) -> ApiKey | None:
        """The entry of an API key; each is compared in constant time."""
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        matches = [entry for entry in self.api_keys() if hmac.compare_digest(entry.sha256, sha256)]
        return matches[0] if matches else None

    def check(self) -> None:
        """Raise SQLAlchemyError where the log can't be written now. It writes no row, but asks to."""
        with Session(self.engine) as session, session.begin():
            session.execute(select(Request.id).limit(1))
            session.execute(update(RolledUp).where(RolledUp.id < 0).values(id=0))

    def reading(self) -> Session:
        """A session that takes no write lock, whose rows outlive it."""
        return Session(self.readers, expire_on_commit=False)

    def _mark_interrupted(self) -> None:
        """Rows that a dead process left `received` will get no outcome any more."""
        with Session(self.engine) as session, session.begin():
            for request in session.scalars(select(Request).where(Request.status == literal_column("'received'"))):
                if _is_dead(request.process) or request.received_at < now() - _ABANDONED:
                    request.status, request.finished_at = INTERRUPTED, now()


def _process_name(pid: int) -> str:
    """host:pid:start. A pid is used again, but not with the same start.

    The start is in ticks since the machine started: the clock on the wall may be set. Raises psutil.NoSuchProcess.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc_pid_stat(5): starttime
        start = f"{boot_id}.{ticks}"
    except OSError:  # no Linux, or no such process
        start = f"{psutil.Process(pid).create_time():.2f}"
    return f"{socket.gethostname()}:{pid}:{start}"


def _is_dead(name: str | None) -> bool:
    """True where it ran on this machine and does not any more."""
    if name is None:
        return True
    host, pid, _ = name.split(":")
    if host != socket.gethostname():
        return False
    try:
        return name != _process_name(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _location(url: str):
    """A database's URL. Raises UserError, without its password, for what is none of SQLite's or PostgreSQL's."""
    what = "DATABASE_URL is sqlite:////folder/file.sqlite3 or postgresql://user:password@host/name"
    try:
        location = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UserError(f"DATABASE_URL is no URL of a database. {what}") from error
    if location.drivername in ("postgres", "postgresql"):  # the first is what hosting services write
        location = location.set(drivername="postgresql+psycopg")
    if location.drivername not in ("sqlite", "postgresql+psycopg"):
        raise UserError(f"DATABASE_URL begins with {location.drivername}. {what}")
    if location.drivername == "sqlite" and not location.database:
        raise UserError(f"DATABASE_URL names no file. {what}")
    return location


def _make_private(path: str) -> None:
    """Make the folder and file of a SQLite database, for their owner alone: it holds what people wrote."""
    if path == ":memory:":
        raise UserError("DATABASE_URL: a database in memory loses the log; name a file")
    try:
        if not (folder := Path(path).parent).exists():
            folder.mkdir(parents=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        if Path(path).stat().st_uid == os.getuid():
            os.chmod(path, 0o600)
    except (OSError, ValueError) as error:
        raise UserError(f"DATABASE_URL: {path} can't be written: {getattr(error, 'strerror', error)}") from error


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _prepare_sqlite(connection, _record) -> None:
    """Durable and concurrent: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous."""
    connection.isolation_level = None  # pysqlite's own implicit BEGIN is deferred, and fails under concurrent writers
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def migrations(connection):
    """Alembic's configuration for this connection: command.upgrade(migrations(connection), "head")."""
    from alembic.config import Config

    config = Config()
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))  # Alembic takes % for a variable
    config.attributes["connection"] = connection
    return config


def _migrate(engine: Engine) -> None:
    """Bring the schema up to date, in one transaction that one process at a time holds."""
    from alembic import command
    from alembic.runtime.migration import MigrationContext
    from alembic.util.exc import CommandError

    with engine.begin() as connection:  # SQLite: IMMEDIATE, the write lock
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(20260101)"))
        tables = inspect(connection).get_table_names()
        version = MigrationContext.configure(connection).get_current_revision()
        if ("requests" in tables and version is None) or version in ("0001", "0002"):
            raise UserError(
                "DATABASE_URL: this log was made by a version that is no longer read: open it once with commit 18b38e9"
            )
        try:
            command.upgrade(migrations(connection), "head")
        except CommandError as error:
            raise UserError("DATABASE_URL: this log was made by a newer version than this one") from error
