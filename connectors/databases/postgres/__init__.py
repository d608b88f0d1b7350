"""PostgreSQL: capture of commits, the cluster as a whole, its log, and the servers of clones.

`database` and `assembly` are the door; `programs` is what all rooms use.
"""
