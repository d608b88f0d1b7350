"""The command line: a file for each group of commands, what they print, and what `--json` gives.

`cli` is the list of all commands. Nothing but `__main__` imports from here.
"""
