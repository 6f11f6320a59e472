"""The papers' tables as commands; see `__main__`."""
