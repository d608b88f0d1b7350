"""From a commit to a sealed recovery point: window, rules, agenda, and the main path.

`pipeline` is the file to read first. Only `service` and `cli` import from here.
"""
