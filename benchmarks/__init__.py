"""Each benchmark is a program: `python -m benchmarks.NAME`; its method stands in its docstring."""

import os

# A program that is started is measured as it is installed: with its bytecode, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
