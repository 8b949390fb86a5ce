"""Who asked, by which route; the expected score and abstention; feedback; API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ADDED = (
    sa.Column("route", sa.String),
    sa.Column("api_key", sa.String),
    sa.Column("score", sa.Float),
    sa.Column("abstain", sa.Boolean),
    sa.Column("process", sa.String),
)


def upgrade() -> None:
    for column in ADDED:
        op.add_column("requests", column)
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


def downgrade() -> None:
    op.drop_table("api_keys")
    op.drop_table("feedback")
    for column in ADDED:
        op.drop_column("requests", column.name)
