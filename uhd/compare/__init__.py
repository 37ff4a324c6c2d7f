"""Slicing rules side by side on one's own images: a table, plain data, and one HTML page with nothing outside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from .choosing import Choice as Choice
    from .choosing import Option as Option
    from .choosing import choose as choose
    from .explore import explore_page as explore_page
    from .measuring import COLUMNS as COLUMNS
    from .measuring import Measured as Measured
    from .measuring import all_rules as all_rules
    from .measuring import measure_sizes as measure_sizes
    from .overview import overview_page as overview_page
    from .page import html_page as html_page
    from .page import write_page as write_page
    from .report import Comparison as Comparison
    from .report import Entry as Entry
    from .report import compare as compare
    from .report import curves_over_aspect as curves_over_aspect
    from .report import curves_over_size as curves_over_size
    from .report import pareto as pareto
    from .report import picture_of as picture_of
    from .report import system_of as system_of
    from .report import table as table
    from .summary import Summary as Summary
    from .summary import records as records
    from .summary import summarize as summarize

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

__all__ = [*_HOMES]

__getattr__ = lazily(__name__, _HOMES)  # pages draw pictures, tables need numbers only
