"""Hours are counted when they are over, and not with each request.

Counts of the hours before this one stay as they are. Those of the present hour go: it is counted when it is over.
"""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    connection = op.get_bind()
    rolled_up = op.create_table(
        "rolled_up", sa.Column("id", sa.Integer, primary_key=True), sa.Column("until", sa.DateTime, nullable=False)
    )
    tallies = sa.table("tallies", sa.column("hour", sa.DateTime))
    # The log may be older than its tallies, so all is counted anew where there are none.
    hour = datetime.now(UTC).replace(tzinfo=None, minute=0, second=0, microsecond=0)
    counted = connection.scalar(sa.select(sa.func.count()).select_from(tallies)) > 0
    connection.execute(rolled_up.insert(), {"id": 1, "until": hour if counted else datetime(2000, 1, 1)})
    connection.execute(tallies.delete().where(tallies.c.hour >= hour))
    op.create_index("ix_requests_finished_at", "requests", ["finished_at"])
    op.drop_index("ix_requests_status", "requests")
    op.create_index("ix_requests_received", "requests", ["id"], **_only("status = 'received'"))


def _only(condition: str) -> dict:
    """An index of a few rows costs the others nothing."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}
