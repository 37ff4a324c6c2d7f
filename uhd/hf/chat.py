"""Conversations and chat templates of every kind: those that know images, and those of parts or strings only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

_PROBE = "uhd probe"
_RENDERER = ("conversations", "chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message")
_RENDERER += ("return_assistant_tokens_mask",)
"""Parameters of the function that renders templates: no variables of a template."""


def chosen_template(own: str | dict[str, str] | None, chat_template: str | None) -> str:
    """A template's text, given it, its name, or nothing."""
    if chat_template is not None:
        return own.get(chat_template, chat_template) if isinstance(own, dict) else chat_template
    template = own.get("default") if isinstance(own, dict) else own
    if template is None:
        names = f"; it has those named {', '.join(own)}" if isinstance(own, dict) else ""
        raise ValueError(f"this processor has no default chat template{names}: pass chat_template")
    return template


def is_message(item: Any) -> bool:
    return isinstance(item, dict) or hasattr(item, "content")


def parts_of(message: Any) -> Iterator[dict[str, Any]]:
    """The parts of a message whose content is a list; messages and parts may be objects with fields, too."""
    content = as_dict(message).get("content")
    yield from map(as_dict, content if isinstance(content, (list, tuple)) else ())


def without_none(messages: Sequence[Any], needed: bool) -> list[Any]:
    """Messages without those fields of their parts that are None, as tables fill in what a row does not have.

    Raises:
        ValueError: Nothing is left of an image or a video that is ``needed`` here.
    """
    return [_without_none(message, needed) for message in messages]


def _without_none(message: Any, needed: bool) -> Any:
    parts = list(parts_of(message))
    if not any(value is None for part in parts for value in part.values()):
        return message
    kept = [{key: value for key, value in part.items() if value is not None} for part in parts]
    for part, left in zip(parts, kept, strict=True):
        if needed and kind_of(part) in part.keys() - left.keys() and not left.keys() - {"type", "text"}:
            raise ValueError(f"the {kind_of(part)} of a message is None: give it, or leave the field out")
    return {**as_dict(message), "content": kept}


def as_dict(item: Any) -> dict[str, Any]:
    return item if isinstance(item, dict) else vars(item)


def kind_of(part: Mapping[str, Any]) -> str:
    """``"image"``, ``"video"``, ``"text"``, or what else a part of a message says that it is."""
    return {"image_url": "image"}.get(part["type"], part["type"])


def sources(part: Mapping[str, Any], *keys: str) -> list[Any]:
    """What a part of a message holds under these keys; OpenAI's messages have an address in a dictionary there."""
    given = [part[key] for key in keys if key in part]
    return [item["url"] if isinstance(item, dict) and "url" in item else item for item in given]


def with_token_variables(
    template: str, tokens: Mapping[str, str | None], kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A template that reads the variables ``image_token`` and ``video_token``, with their values written before it.

    As keywords, transformers would take them for the user's words; those with another value stay keywords.
    """
    kept = dict(kwargs)
    for kind, token in tokens.items():
        name = f"{kind}_token"
        if token is not None and kept.get(name, token) == token and re.search(rf"\b{name}\b", template):
            kept.pop(name, None)
            template = f"{{% set {name} = {json.dumps(token)} %}}\n{template}"  # the line break is left out again
    return template, kept


def takes_lists(
    template: str, kinds: Sequence[str], tokens: Mapping[str, str | None], variables: Mapping[str, Any]
) -> bool:
    """Whether messages in list form go to a template as they are, rather than as strings.

    They do where it renders them: one token for each image or video among ``kinds``, or without any the text. They do
    also where it shows no string either, so that strings would be no better.

    Args:
        template: Its text.
        kinds: Of ``"image"`` and ``"video"``, those that a conversation holds.
        tokens: The placeholder of each kind.
        variables: What else the template will be given.
    """
    plain = {name: value for name, value in variables.items() if name not in _RENDERER and _is_json(value)}
    given = json.dumps(plain, sort_keys=True)
    if kinds and all(tokens[kind] and _writes(template, kind, tokens[kind], given) for kind in kinds):
        return True
    if not kinds:
        text = _rendered(template, json.dumps([{"type": "text", "text": _PROBE}]), given) or ""
        if _PROBE in text and not re.search(r"""["']type["']""", text):
            return True
    as_string = _rendered(template, json.dumps(_PROBE), given)
    return as_string is not None and _PROBE not in as_string


def _writes(template: str, kind: str, token: str, variables: str) -> bool:
    """Whether a chat template renders a list of an image or video and text with exactly one such token."""
    text = _rendered(template, json.dumps([{"type": kind}, {"type": "text", "text": "x"}]), variables)
    return text is not None and text.count(token) == 1


@lru_cache(maxsize=64)
def _rendered(template: str, content: str, variables: str) -> str | None:
    """A user's message of this content under a template, ``None`` where the template raises."""
    message = {"role": "user", "content": json.loads(content)}
    try:
        [text], _ = render_jinja_template(conversations=[[message]], chat_template=template, **json.loads(variables))
    except Exception:  # templates raise what they like on content that they do not know
        return None
    return text


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def mark_words(
    found: Any,
    tokenizer: Any,
    conversations: list[Any],
    template: str,
    kwargs: Mapping[str, Any],
    visual: set[int | None],
) -> Any:
    """Mark the assistant's words in a tokenized chat with images, whose positions some releases do not count.

    The same chat is tokenized with one placeholder an image, and the marks of its words go to the same words here.

    Args:
        found: What ``apply_chat_template`` made; nothing happens unless it has ``assistant_masks``.
        tokenizer, conversations, template, kwargs: What it was made of.
        visual: Ids of the image token, and of the video token or ``None``.

    Raises:
        ValueError: The words are not the same, so nothing can be marked.
    """
    if not isinstance(found, Mapping) or "assistant_masks" not in found:
        return found
    own = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation")
    others = {name: value for name, value in kwargs.items() if name not in (*own, "max_length")}
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    told = tokenizer.apply_chat_template(conversations, chat_template=template, **asked, **others)
    masks = []
    for ids, words, marks in zip(found["input_ids"], told["input_ids"], told["assistant_masks"], strict=True):
        places = [place for place, token in enumerate(map(int, ids)) if token not in visual]
        kept = [(word, mark) for word, mark in zip(words, marks, strict=True) if word not in visual]
        row, wanted = [int(ids[place]) for place in places], [word for word, _ in kept]
        starts = range(len(row) - len(wanted) + 1)  # padding and special tokens may stand around them
        start = next((start for start in starts if row[start : start + len(wanted)] == wanted), None)
        if start is None:
            raise ValueError("the assistant's words cannot be marked: truncation, or the tokenizer, changed the text")
        mask = [0] * len(ids)
        for place, (_, mark) in zip(places[start:], kept, strict=False):
            mask[place] = mark
        masks.append(mask)
    as_list = isinstance(found["assistant_masks"], list)
    found["assistant_masks"] = masks if as_list else torch.tensor(masks)
    return found
