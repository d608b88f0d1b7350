"""A clone of the cluster: born isolated, replayed to a target, looked at, and made fit to take production's place.

It knows the log and the programs; only `assembly` makes one, and `preflight` asks it in which volume a path lies.
"""
