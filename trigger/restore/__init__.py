"""From a recovery point back to a commit: what is named, the plan, the clone, the proof, and the way into place.

It knows the catalog and the ports. `keep` asks its planner which log leads where.
"""
