"""The stream of commits: one logical slot in one database, decoded from pgoutput.

It knows connections and the words of the service; the door (`database`, `preflight`) imports it.
"""
