"""Raw samples of training data, as the processor's output for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from uhd.hf.chat import as_dict, chosen_template, is_message, kind_of, parts_of, without_none

_GENERATION = re.compile(r"\{%-?\s*generation\b")
"""The block around an assistant's words in a chat template, which tells them from the rest."""


def prepare_sample(sample: Mapping[str, Any], processor: Any) -> Mapping[str, Any]:
    """What the processor makes of ``{"text" | "messages", "images", "videos"}``; other keys are not looked at.

    Images and videos stand where the text has its tokens, or where parts of the messages are ``{"type": "image"}`` or
    ``{"type": "video"}`` without a source, in order; messages without such a part have them in front of the first
    text of the user. Of messages, only what the assistant says is a target where the chat template marks it.

    ``None`` is what a table has where a row has nothing.

    Raises:
        ValueError: Neither or both of text and messages, no message, one without a role, or places and media differ in
            number.
    """
    text, messages = sample.get("text"), sample.get("messages")
    if (text is None) == (messages is None):
        there = sorted(name for name, value in sample.items() if value is not None)
        raise ValueError(
            f"a sample has text or messages, or input_ids that the processor made; this one has {there}: say with "
            "prepare= how it is prepared"
        )
    media = {kind: _listed(sample.get(f"{kind}s")) for kind in ("image", "video")}
    if text is not None:
        return processor(text=text, **{f"{kind}s": given or None for kind, given in media.items()})
    _check_messages(messages)
    messages = without_none(messages, needed=False)
    if any(media.values()):
        messages = [_in_parts(message) for message in messages]
    for kind, given in media.items():
        _place(messages, kind, given)
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=bool(_GENERATION.search(chosen_template(processor.chat_template, None))),
    )


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages are a list of at least one, got {messages!r:.80}")
    for message in messages:
        if not is_message(message) or "role" not in as_dict(message):
            raise ValueError(f'a message is {{"role": ..., "content": ...}}, got {message!r:.80}')


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def _in_parts(message: Any) -> dict[str, Any]:
    """A copy whose content is a list, of copies."""
    message = dict(as_dict(message))
    words = message.get("content")
    parts = [{"type": "text", "text": words}] if isinstance(words, str) else map(dict, parts_of(message))
    return message if words is None else {**message, "content": list(parts)}


def _place(messages: Sequence[Any], kind: str, given: list[Any]) -> None:
    """Put each of these images or videos into its part of the messages."""
    if given and not any(kind_of(part) == kind for message in messages for part in parts_of(message)):
        user = next((message for message in messages if message["role"] == "user"), messages[0])
        user["content"] = [*({"type": kind} for _ in given), *(user.get("content") or ())]
    empty = [part for message in messages for part in parts_of(message) if part == {"type": kind}]
    if len(empty) != len(given):
        raise ValueError(
            f"the messages have {len(empty)} parts of type {kind!r} without a source, and the sample has {len(given)} "
            f"{kind}s: give as many"
        )
    for part, source in zip(empty, given, strict=True):
        part[kind] = source
