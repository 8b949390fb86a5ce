"""Run by Alembic on the connection that Store hands over: https://alembic.sqlalchemy.org/en/latest/cookbook.html."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
