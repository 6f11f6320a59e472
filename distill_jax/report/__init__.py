"""What one sees of a run: progress while it goes, tables and files when it is done."""

from distill_jax.report.estimate import duration
from distill_jax.report.events import json_reporter, stage_fields
from distill_jax.report.progress import brief, console, console_reporter, describe
from distill_jax.report.summary import summarise
from distill_jax.report.tables import ResultsTable, results_table, title
from distill_jax.report.writers import EpochEnded, StageEnded, StageInfo, StageStarted, Writer
from distill_jax.train.reporter import Reporter

__all__ = [
    "EpochEnded",
    "Reporter",
    "ResultsTable",
    "StageEnded",
    "StageInfo",
    "StageStarted",
    "Writer",
    "brief",
    "console",
    "console_reporter",
    "describe",
    "duration",
    "json_reporter",
    "results_table",
    "stage_fields",
    "summarise",
    "title",
]
