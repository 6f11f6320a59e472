"""Notebooks that explain the three methods, each with its source beside it as a script."""
