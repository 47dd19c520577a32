"""Commands of evaluate.py: each file registers its own parser and settings, and runs.

The docstring of each file is its help: one line, then runnable examples. evaluate.py reads it without importing the
file, so that `--help` does not wait for PyTorch.
"""
