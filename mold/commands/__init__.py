"""The command line: `mold NAME` is NAME.py, with its `main`."""
