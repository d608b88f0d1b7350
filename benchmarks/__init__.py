"""Each benchmark is a program: `python -m benchmarks.NAME`; its method stands in its docstring."""
