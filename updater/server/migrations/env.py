"""Alembic's entry: migrations run on the connection that `Database.migrate` gives."""

from __future__ import annotations

from alembic import context

from updater.server.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
