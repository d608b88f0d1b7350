"""`trigpoint demo`: a bank on a PostgreSQL of its own, an accident, and the way back to the commit right before it.

Everything is real: the server, the load, and the service, which is started by the command that a user would type.
The demo only makes the ground they stand on, watches, and checks the outcome against what the bank itself says.
"""
