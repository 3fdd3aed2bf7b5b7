"""Examples, run from a clone: `python -m examples.demo`."""
