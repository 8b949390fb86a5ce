"""The log as it first was: one table. A database from then has no alembic_version, and is taken to be here."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


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
    )


def downgrade() -> None:
    op.drop_table("requests")
