"""An image as the language model reads it: the order of its slices, and the separators between them. No torch."""

from uhd.schema.layout import PRESETS, Entry, SpatialSchema, TokenLayout, layout, parse_symbols
from uhd.schema.separators import SeparatorIds, resolve_schema, resolve_separator

__all__ = [
    "PRESETS",
    "Entry",
    "SeparatorIds",
    "SpatialSchema",
    "TokenLayout",
    "layout",
    "parse_symbols",
    "resolve_schema",
    "resolve_separator",
]
