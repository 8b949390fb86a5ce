"""Counts by hour, for the report; confidence and full-text search, for the review."""

from collections import Counter

import sqlalchemy as sa
from alembic import op

from hatespeech.serving.store import tallies_of, tally_rows

revision = "0003"
down_revision = "0002"

SQLITE = (
    "CREATE TABLE searchable (number INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE)",
    # Without a copy of the texts: https://www.sqlite.org/fts5.html#contentless_tables
    "CREATE VIRTUAL TABLE request_texts USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2')",
    """CREATE TRIGGER searchable_insert AFTER INSERT ON requests WHEN new.text IS NOT NULL BEGIN
        INSERT INTO searchable (request_id) VALUES (new.id);
        INSERT INTO request_texts (rowid, text)
            SELECT number, new.text FROM searchable WHERE request_id = new.id;
    END""",
    """CREATE TRIGGER searchable_delete AFTER DELETE ON requests WHEN old.text IS NOT NULL BEGIN
        INSERT INTO request_texts (request_texts, rowid, text)
            SELECT 'delete', number, old.text FROM searchable WHERE request_id = old.id;
        DELETE FROM searchable WHERE request_id = old.id;
    END""",
    "INSERT INTO searchable (request_id) SELECT id FROM requests WHERE text IS NOT NULL",
    """INSERT INTO request_texts (rowid, text)
        SELECT number, text FROM searchable JOIN requests ON requests.id = searchable.request_id""",
)
POSTGRESQL = ("CREATE INDEX request_texts ON requests USING gin (to_tsvector('simple', left(text, 50000)))",)


def upgrade() -> None:
    connection = op.get_bind()
    op.add_column("requests", sa.Column("confidence", sa.Float))
    op.add_column("requests", sa.Column("text_key", sa.String))
    tallies = op.create_table(
        "tallies",
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column("model_digest", sa.String, primary_key=True),
        sa.Column("measure", sa.String, primary_key=True),
        sa.Column("bin", sa.String, primary_key=True),
        sa.Column("n", sa.Integer, nullable=False),
    )
    highest = "max" if connection.dialect.name == "sqlite" else "greatest"
    op.execute(f"UPDATE requests SET confidence = {highest}(p_hate, p_neutral, p_supportive) WHERE label IS NOT NULL")
    op.create_index("ix_requests_confidence", "requests", ["confidence", "id"])
    op.execute("UPDATE requests SET text_key = substr(text_sha256, 1, 16)")
    op.create_index("ix_requests_repeated", "requests", ["text_key", "received_at"])
    names = ("received_at", "status", "model_digest", "label", "abstain", "score", "duration_ms")
    columns = (sa.column("received_at", sa.DateTime), *map(sa.column, names[1:]))
    finished = sa.select(*columns).select_from(sa.table("requests")).where(sa.column("status") != "received")
    counts = Counter(key for row in connection.execute(finished) for key in tallies_of(**row._mapping))
    if counts:
        connection.execute(tallies.insert(), tally_rows(counts))
    for statement in SQLITE if connection.dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for statement in ("TRIGGER searchable_insert", "TRIGGER searchable_delete", "TABLE request_texts"):
            op.execute(f"DROP {statement}")
        op.drop_table("searchable")
    else:
        op.drop_index("request_texts", "requests")
    for name in ("ix_requests_confidence", "ix_requests_repeated"):
        op.drop_index(name, "requests")
    op.drop_table("tallies")
    op.drop_column("requests", "text_key")
    op.drop_column("requests", "confidence")
