"""What runs: the drivers put together, tasks, signals, the control socket, upkeep, and the checks before a start.

Imported by `cli`, and by `demo` for the socket.
"""
