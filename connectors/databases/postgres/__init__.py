"""PostgreSQL: capture of commits, the cluster as a whole, its log, and the servers of clones."""

from connectors.databases.postgres.database import Postgres

__all__ = ["Postgres"]
