"""Slicing rules side by side on one's own images: a table, plain data, and one HTML page with nothing outside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from .choosing import Choice, Option, choose
    from .explore import explore_page
    from .measuring import COLUMNS, Measured, all_rules, measure_sizes
    from .overview import overview_page
    from .page import html_page, write_page
    from .report import (
        Comparison,
        Entry,
        compare,
        curves_over_aspect,
        curves_over_size,
        pareto,
        picture_of,
        system_of,
        table,
    )
    from .summary import Summary, records, summarize

_NAMES = {
    "choosing": "Choice Option choose",
    "explore": "explore_page",
    "measuring": "COLUMNS Measured all_rules measure_sizes",
    "overview": "overview_page",
    "page": "html_page write_page",
    "report": "Comparison Entry compare curves_over_aspect curves_over_size pareto picture_of system_of table",
    "summary": "Summary records summarize",
}
_HOMES = {name: f"uhd.compare.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "COLUMNS",
    "Choice",
    "Comparison",
    "Entry",
    "Measured",
    "Option",
    "Summary",
    "all_rules",
    "choose",
    "compare",
    "curves_over_aspect",
    "curves_over_size",
    "explore_page",
    "html_page",
    "measure_sizes",
    "overview_page",
    "pareto",
    "picture_of",
    "records",
    "summarize",
    "system_of",
    "table",
    "write_page",
]

__getattr__ = lazily(__name__, _HOMES)  # pages draw pictures, tables need numbers only
