"""Ends a run in the middle, as a kill does."""

from distill_jax.train.reporter import Reporter


class Killed(BaseException):
    """What ends a run at once."""


class Steps(Reporter):
    """Ends the run after some steps."""

    def __init__(self, left):
        self.left = left

    def progress(self, step, examples_per_second):
        """Called after every dispatch."""
        self.left -= 1
        if not self.left:
            raise Killed
