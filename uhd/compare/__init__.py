"""Slicing rules side by side on one's own images: a table, plain data, and one HTML page with nothing outside it."""

from .page import html_page, write_page
from .report import (
    Comparison,
    Entry,
    all_rules,
    compare,
    curves_over_aspect,
    curves_over_size,
    pareto,
    picture_of,
    system_of,
    table,
)

__all__ = [
    "Comparison",
    "Entry",
    "all_rules",
    "compare",
    "curves_over_aspect",
    "curves_over_size",
    "html_page",
    "pareto",
    "picture_of",
    "system_of",
    "table",
    "write_page",
]
