"""Ids of separators and markers under a language model's own tokenizer.

The expanded sequence is never tokenised as text: ",\\n" and "\\n\\n" merge under many vocabularies, SentencePiece puts
a space piece before whatever follows an image token, and characters without a piece fall back to bytes. Each symbol
is resolved once and takes one position.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from uhd.schema.layout import SpatialSchema

MAX_CONTEXTS = 8
"""Added tokens tried as surroundings before the symbol is encoded alone."""


@dataclass(frozen=True)
class SeparatorIds:
    """Ids of one symbol: its embedding is that of the id, or the mean over several.

    Attributes:
        ids: At least one.
        how: ``"probe"``: what the tokenizer makes of it beside an image token; ``"vocabulary"``: looked up by name,
            as added tokens are and what encoding cannot reach; ``"pieces"``: no single token says it; ``"given"``.
    """

    ids: tuple[int, ...]
    how: str


def resolve_separator(tokenizer: Any, symbol: str, *, image_token: str | None = None) -> SeparatorIds:
    """Find the ids of one symbol, once for a tokenizer.

    In this order: an added token of that name; the one id that stands between two image tokens, space pieces left out;
    a vocabulary entry (the name itself, its byte, its byte-level letter, its word-start form) that decodes to it; the
    pieces the tokenizer writes it with, whose mean is a usable vector.

    >>> from uhd.nano.build import character_tokenizer
    >>> resolve_separator(character_tokenizer(), ",")
    SeparatorIds(ids=(77,), how='probe')

    Args:
        tokenizer: Anything with transformers' ``encode``, ``decode`` and ``convert_tokens_to_ids``. It is not changed.
        symbol: Text such as ``","`` or ``"<image>"``.
        image_token: The token that stands for an image; ``None`` tries ``tokenizer.image_token`` and the special and
            added tokens, and last the symbol alone.

    Raises:
        TypeError: The tokenizer lacks one of the methods.
        ValueError: The symbol is empty or cannot be written, or ``image_token`` is not one token.
    """
    missing = [name for name in ("encode", "decode", "convert_tokens_to_ids") if not hasattr(tokenizer, name)]
    if missing:
        raise TypeError(
            f"{type(tokenizer).__name__} lacks {', '.join(missing)}: pass a transformers tokenizer, or wrap a "
            "tokenizers.Tokenizer as PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    if not symbol:
        raise ValueError("a separator is a non-empty string")
    added = _added_tokens(tokenizer)
    if symbol in added:
        return SeparatorIds((added[symbol],), "vocabulary")
    pieces: tuple[int, ...] = ()
    for context in _contexts(tokenizer, image_token):
        ids = _between(tokenizer, symbol, context)
        if len(ids) == 1 and _reads(tokenizer, ids[0], symbol):
            return SeparatorIds(ids, "probe")
        pieces = pieces or ids
    named = _by_name(tokenizer, symbol)
    if named is not None:
        return SeparatorIds((named,), "vocabulary")
    if pieces:
        return SeparatorIds(pieces, "pieces")
    raise ValueError(
        f"this tokenizer ({type(tokenizer).__name__}) cannot write {symbol!r}: no token, or only the unknown "
        f"one. Add a token for it, or choose ids with resolve_schema(..., given={{{symbol!r}: id}})"
    )


def resolve_schema(
    tokenizer: Any,
    schema: SpatialSchema,
    *,
    image_token: str | None = None,
    num_images: int = 1,
    given: Mapping[str, int | Sequence[int]] | None = None,
) -> dict[str, SeparatorIds]:
    """Ids of every symbol of a schema that is no view and not learned.

    >>> from uhd.nano.build import character_tokenizer
    >>> ids = resolve_schema(character_tokenizer(), SpatialSchema.preset("llava-uhd"), given={",": [3, 5]})
    >>> [(found.ids, found.how) for found in ids.values()]
    [((3, 5), 'given'), ((99,), 'probe')]

    Args:
        tokenizer, image_token: As in :func:`resolve_separator`.
        schema: Its ``learned`` symbols are left out: they have no ids.
        num_images: Where the schema numbers images, the numbers 0 .. num_images - 1 are resolved too.
        given: Ids chosen by hand, by symbol.

    Returns:
        Symbol -> ids, in the order of ``schema.separators``, then the numbers.

    Raises:
        ValueError: As :func:`resolve_separator`; ``given`` names a symbol the schema lacks or an id that is no
            non-negative int; or two symbols end up with the same vector (1 and 11, where digits are tokens).
    """
    symbols = [symbol for symbol in schema.separators if symbol not in schema.learned]
    if schema.image_id is not None:
        symbols += [str(index) for index in range(num_images)]
    given = given or {}
    unknown = [symbol for symbol in given if symbol not in symbols]
    if unknown:
        raise ValueError(f"ids given for {unknown}, but schema {schema.name!r} resolves {symbols}")
    found: dict[str, SeparatorIds] = {}
    owners: dict[frozenset[tuple[int, Fraction]], str] = {}
    for symbol in symbols:
        if symbol in given:
            found[symbol] = SeparatorIds(_given_ids(symbol, given[symbol]), "given")
        else:
            found[symbol] = resolve_separator(tokenizer, symbol, image_token=image_token)
        ids = found[symbol].ids
        # what the mean of their embeddings depends on: neither order nor a common multiple
        shares = frozenset((value, Fraction(count, len(ids))) for value, count in Counter(ids).items())
        if shares in owners:
            raise ValueError(
                f"{owners[shares]!r} and {symbol!r} both resolve to the mean of the ids {ids}: choose one with "
                f"resolve_schema(..., given={{{symbol!r}: id}})"
            )
        owners[shares] = symbol
    return found


def _given_ids(symbol: str, ids: int | Sequence[int]) -> tuple[int, ...]:
    try:
        values = tuple(map(operator.index, [ids] if isinstance(ids, int) else ids))
    except TypeError:
        values = ()
    if not values or min(values) < 0:
        raise ValueError(f"ids given for {symbol!r} must be a non-negative int or several, got {ids!r}")
    return values


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}


def _contexts(tokenizer: Any, image_token: str | None) -> Iterator[str]:
    """Tokens to stand around the symbol, best first; the empty one is the symbol alone."""
    if image_token is not None:
        alone = len(tokenizer.encode(image_token, add_special_tokens=False)) == 1
        if not alone or _token_id(tokenizer, image_token) is None:
            raise ValueError(
                f"image_token {image_token!r} is not one token of this tokenizer: add it with "
                f"tokenizer.add_special_tokens, or leave image_token out"
            )
        yield image_token
    else:
        names = [getattr(tokenizer, "image_token", None), *getattr(tokenizer, "all_special_tokens", ())]
        names = [name for name in dict.fromkeys([*names, *_added_tokens(tokenizer)]) if isinstance(name, str)]
        yield from [name for name in names if _token_id(tokenizer, name) is not None][:MAX_CONTEXTS]
    yield ""


def _between(tokenizer: Any, symbol: str, context: str) -> tuple[int, ...]:
    """Ids of the symbol between two context tokens, without space pieces; () if hidden, swallowed or unknown."""
    ids = list(tokenizer.encode(context + symbol + context, add_special_tokens=False))
    if context:
        mark = _token_id(tokenizer, context)
        places = [place for place, value in enumerate(ids) if value == mark]
        # a context that strips its neighbours or melts into them proves nothing
        ids = ids[places[0] + 1 : places[-1]] if len(places) >= 2 else []
    blank = {"", " "} - {symbol}
    ids = tuple(value for value in ids if tokenizer.decode([value]) not in blank)
    return () if getattr(tokenizer, "unk_token_id", None) in ids else ids


def _by_name(tokenizer: Any, symbol: str) -> int | None:
    word_start = "\N{LOWER ONE EIGHTH BLOCK}" + symbol
    byte_token = f"<0x{ord(symbol):02X}>" if len(symbol) == 1 and symbol.isascii() else symbol
    # byte-level BPE writes control characters and the space as the letters from U+0100 on
    byte_letters = "".join(chr(0x100 + ord(char)) if ord(char) <= 0x20 else char for char in symbol)
    for name in dict.fromkeys([symbol, byte_token, byte_letters, word_start]):
        value = _token_id(tokenizer, name)
        if value is not None and _reads(tokenizer, value, symbol):
            return value
    return None


def _reads(tokenizer: Any, value: int, symbol: str) -> bool:
    text = tokenizer.decode([value])
    return symbol in (text, text.strip(" "))


def _token_id(tokenizer: Any, name: str) -> int | None:
    value = tokenizer.convert_tokens_to_ids(name)
    return None if value is None or value == getattr(tokenizer, "unk_token_id", None) else value
