"""The catalog: what is known of points, commits and gaps, as tables, as tags in a storage, and held against each other.

Imported by every room above. It knows the ports and nothing of how a point is made or a commit comes back.
"""
