"""The log: one row a request, committed before Ollama is called and again before the answer leaves.

SQLAlchemy 2 models and queries; the only module that knows SQL.
"""

import hashlib
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import create_engine, event, select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from hatespeech import task

RECEIVED, ANSWERED, REFUSED, FAILED = "received", "answered", "refused", "failed"


class Base(DeclarativeBase):
    pass


class Request(Base):
    """A request to /infer. Times are UTC without a zone, since SQLite keeps none.

    status: received (Ollama is being asked, or the service died asking) -> answered, refused (the request's fault)
    or failed (ours or Ollama's). text is what came, undecodable bytes as \\xNN; null if the body was too large to read.
    """

    __tablename__ = "requests"

    id: Mapped[str] = mapped_column(primary_key=True)
    received_at: Mapped[datetime] = mapped_column(index=True)
    finished_at: Mapped[datetime | None]
    status: Mapped[str] = mapped_column(index=True)
    http_status: Mapped[int | None]
    text: Mapped[str | None]
    text_sha256: Mapped[str | None]
    label: Mapped[str | None]
    p_hate: Mapped[float | None]
    p_neutral: Mapped[float | None]
    p_supportive: Mapped[float | None]
    duration_ms: Mapped[float | None]
    error: Mapped[str | None]
    model: Mapped[str]
    model_digest: Mapped[str | None]
    prompt_version: Mapped[str]
    calibration: Mapped[str | None]


class Store:
    """The database behind a URL such as sqlite:////var/lib/hatespeech/requests.sqlite3. Threads may share it."""

    def __init__(self, url: str):
        self.url = make_url(url)
        if self.url.get_backend_name() == "sqlite" and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(self.url)
        if self.url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        Base.metadata.create_all(self.engine)

    def received(self, body: bytes | None, model: str) -> str:
        """Commit that a request came, and return its id. body: None where it was not read."""
        request = Request(
            id=uuid.uuid4().hex,
            received_at=_now(),
            status=RECEIVED,
            text=None if body is None else body.decode("utf-8", "backslashreplace"),
            text_sha256=None if body is None else hashlib.sha256(body).hexdigest(),
            model=model,
            prompt_version=task.PROMPT_VERSION,
        )
        with Session(self.engine) as session, session.begin():
            session.add(request)
            return request.id

    def finished(
        self,
        request_id: str,
        *,
        status: str,
        http_status: int,
        duration_ms: float,
        probabilities: Sequence[float] | None = None,
        model_digest: str | None = None,
        calibration: str | None = None,
        error: str | None = None,
    ) -> None:
        """Commit what became of a request."""
        with Session(self.engine) as session, session.begin():
            request = session.get_one(Request, request_id)
            request.finished_at = _now()
            request.status, request.http_status, request.duration_ms = status, http_status, duration_ms
            request.error, request.model_digest, request.calibration = error, model_digest, calibration
            if probabilities is not None:
                request.label = task.decide(probabilities)
                request.p_hate, request.p_neutral, request.p_supportive = probabilities

    def latest(self, limit: int = 20) -> list[Request]:
        """The newest requests, newest first."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            return list(session.scalars(select(Request).order_by(Request.received_at.desc()).limit(limit)))

    def check(self) -> None:
        """Raise SQLAlchemyError where the log can't be written now: BEGIN IMMEDIATE takes SQLite's write lock."""
        with Session(self.engine) as session, session.begin():
            session.execute(select(Request.id).limit(1))


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _prepare_sqlite(connection, _record) -> None:
    """Durable and concurrent: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous."""
    connection.isolation_level = None  # pysqlite's own implicit BEGIN is deferred, and fails under concurrent writers
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
