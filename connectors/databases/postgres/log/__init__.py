"""The write-ahead log as files: received or fetched, kept, audited, staged for a replay.

It knows PostgreSQL's programs and no connection. Clones read the log through it.
"""
