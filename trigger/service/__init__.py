"""What runs: drivers by name, tasks, signals, the control socket, upkeep, and the checks before a start.

Only `drivers` loads connectors, by name. Imported by `cli`, and by `demo` for the socket.
"""
