"""The log as it was at commit 18b38e9, whose databases have this very revision: what is here is there already."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = None

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
)
POSTGRESQL = ("CREATE INDEX request_texts ON requests USING gin (to_tsvector('simple', left(text, 50000)))",)


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("received_at", sa.DateTime, nullable=False, index=True),
        sa.Column("finished_at", sa.DateTime),
        sa.Column("status", sa.String, nullable=False, index=True),
        sa.Column("http_status", sa.Integer),
        sa.Column("text", sa.String),
        sa.Column("text_sha256", sa.String),
        sa.Column("label", sa.String),
        sa.Column("p_hate", sa.Float),
        sa.Column("p_neutral", sa.Float),
        sa.Column("p_supportive", sa.Float),
        sa.Column("duration_ms", sa.Float),
        sa.Column("error", sa.String),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("model_digest", sa.String),
        sa.Column("prompt_version", sa.String, nullable=False),
        sa.Column("calibration", sa.String),
        sa.Column("route", sa.String),
        sa.Column("api_key", sa.String),
        sa.Column("score", sa.Float),
        sa.Column("abstain", sa.Boolean),
        sa.Column("process", sa.String),
        sa.Column("confidence", sa.Float),
        sa.Column("text_key", sa.String),
    )
    op.create_index("ix_requests_confidence", "requests", ["confidence", "id"])
    op.create_index("ix_requests_repeated", "requests", ["text_key", "received_at"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("request_id", sa.String, sa.ForeignKey("requests.id"), nullable=False, index=True),
        sa.Column("received_at", sa.DateTime, nullable=False),
        sa.Column("label", sa.String),
        sa.Column("score", sa.Float),
        sa.Column("note", sa.String),
        sa.Column("api_key", sa.String),
    )
    op.create_table(
        "api_keys",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("scopes", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
    op.create_table(
        "tallies",
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column("model_digest", sa.String, primary_key=True),
        sa.Column("measure", sa.String, primary_key=True),
        sa.Column("bin", sa.String, primary_key=True),
        sa.Column("n", sa.Integer, nullable=False),
    )
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
