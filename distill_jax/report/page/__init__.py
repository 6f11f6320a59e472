"""A run as one static page: pictures, tables and how it was made, from its records alone."""

from distill_jax.report.page.markdown import markdown
from distill_jax.report.page.record import Latency, RecordError, RunRecord, StageRecord
from distill_jax.report.page.search import SearchRecord
from distill_jax.report.page.template import html_page

__all__ = [
    "Latency",
    "RecordError",
    "RunRecord",
    "SearchRecord",
    "StageRecord",
    "html_page",
    "markdown",
]
