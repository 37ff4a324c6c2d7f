"""The user's own words, where they spell a control token: encoded as text, on releases of transformers that cannot."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from uhd.hf.chat import as_dict

_FIRST = 0xE200  # of the private use area, beside the stand-ins of images
_SOURCES = {"type", "image", "video", "url", "path", "base64", "image_url"}
_SPELLED: ContextVar[Mapping[str, str]] = ContextVar("letters for the control tokens in the user's words", default={})  # noqa: B039


@contextmanager
def words_stay_words(
    tokenizer: Any, template: str, conversation: Any, kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """While open, :func:`spelling` encodes as text what the user's strings hold of control tokens.

    Control tokens are the tokenizer's special tokens, and those that it added and the template writes.

    Args:
        tokenizer: Of the processor that is called meanwhile.
        template: The chat template.
        conversation, kwargs: Of ``apply_chat_template``: whatever strings users can write. They are given back with a
            letter of the private use area for each such token, ``sanitize_control_tokens`` left out.

    Raises:
        ValueError: Nothing is tokenized, or the mask of the assistant's tokens is asked for: it needs their places.
    """
    if not kwargs.get("tokenize") or kwargs.get("return_assistant_tokens_mask"):
        raise ValueError("sanitize_control_tokens needs tokenize=True, and no return_assistant_tokens_mask")
    others = {name: value for name, value in kwargs.items() if name != "sanitize_control_tokens"}
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    control = [token.content for token in added if token.special or token.content in template]
    letters = {token: chr(_FIRST + number) for number, token in enumerate(sorted(control, key=len, reverse=True))}
    told = _SPELLED.set({letter: token for token, letter in letters.items()})
    try:
        yield _replaced(conversation, letters), _replaced(others, letters)
    finally:
        _SPELLED.reset(told)


def _replaced(item: Any, letters: Mapping[str, str]) -> Any:
    if isinstance(item, str):
        item = re.sub(f"[{chr(_FIRST)}-{chr(_FIRST + len(letters))}]", "", item)  # not to be forged
        for token, letter in letters.items():
            item = item.replace(token, letter)
        return item
    if isinstance(item, (list, tuple)):
        return [_replaced(part, letters) for part in item]
    if isinstance(item, dict) or hasattr(item, "content") or hasattr(item, "text"):  # messages and parts, objects too
        fields = as_dict(item).items()
        return {key: value if key in _SOURCES else _replaced(value, letters) for key, value in fields}
    return item


def spelling(processor: Any) -> Any:
    """The processor, with a tokenizer that spells the user's words out where there are some."""
    letters = _SPELLED.get()
    if not letters:
        return processor
    processor = copy.copy(processor)
    processor.tokenizer = _Spelling(processor.tokenizer, letters)
    return processor


class _Spelling:
    """A tokenizer that encodes some letters as the text of the control tokens that they stand for."""

    def __init__(self, tokenizer: Any, letters: Mapping[str, str]) -> None:
        self._tokenizer, self._letters = tokenizer, letters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        """As a tokenizer's, for plain lists of texts."""
        names = ["padding", "pad_to_multiple_of", "padding_side", "return_tensors", "return_attention_mask"]
        names += ["max_length"] * (kwargs.get("padding") == "max_length")  # else `pad` warns that it is ignored
        rows = [self._row(line, kwargs.get("add_special_tokens", True)) for line in text]
        if kwargs.get("truncation"):
            rows = [row[: kwargs.get("max_length") or self._tokenizer.model_max_length] for row in rows]
        padding = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return self._tokenizer.pad({"input_ids": rows}, **{"padding": False, **padding})

    def _row(self, line: str, special: bool) -> list[int]:
        pieces = re.split(f"([{''.join(self._letters)}])", line)
        whole = self._tokenizer.encode(pieces[0], add_special_tokens=special)
        for piece in filter(None, pieces[1:]):
            plain = piece in self._letters
            whole += self._after_newline(self._letters.get(piece, piece), split_special_tokens=plain)
        return whole

    def _after_newline(self, text: str, **how: bool) -> list[int]:
        """Without the space that some tokenizers put before the first word of a text."""
        newline = self._tokenizer.encode("\n", add_special_tokens=False)
        ids = self._tokenizer.encode("\n" + text, add_special_tokens=False, **how)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self._tokenizer.encode(text, add_special_tokens=False, **how)
