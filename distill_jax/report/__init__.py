"""What one sees of a run: progress while it goes, tables and files when it is done."""

from distill_jax.report.progress import console, console_reporter
from distill_jax.report.summary import summarise
from distill_jax.report.tables import results_table, title
from distill_jax.train.reporter import Reporter

__all__ = ["Reporter", "console", "console_reporter", "results_table", "summarise", "title"]
