"""What runs: drivers by name, tasks, signals, the control socket, upkeep, and the checks before a start.

Only `connect` loads connectors. Imported by `cli`, and by `demo` for the socket.
"""
