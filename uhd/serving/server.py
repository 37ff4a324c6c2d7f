"""``uhd serve``: transformers' own server, pinned to one model with eyes, whose refusals are the client's to read.

The server is used as it is: one that is made without being run, then told its model, and one exception handler.
"""

from __future__ import annotations

import json
import re
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import AutoConfig
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import TimedModel
from transformers.cli.serving.utils import GenerateManager

from uhd.hf import UHDConfig, UHDForConditionalGeneration
from uhd.nano import load_nano
from uhd.writing import finish, is_file

_ADDRESS = re.compile("(https?|data):", re.IGNORECASE)
_AS_WORDS = '{"sanitize_control_tokens": true}'
"""The words of a conversation are words: no image is looked for where somebody writes "<image>"."""

_ASIDE = frozenset(("metadata", "prediction", "service_tier", "store", "stream_options", "user"))
"""Fields of a request that change no answer. The usage that ``stream_options`` asks for always comes."""

_AS_IT_IS = {
    **dict.fromkeys(("n", "best_of"), ("1",)),
    **dict.fromkeys(("logprobs", "echo", "background"), ("false",)),
    **dict.fromkeys(("functions", "include"), ("[]",)),
    **dict.fromkeys(("presence_penalty", "top_logprobs"), ("0", "0.0")),
    "response_format": ('{"type": "text"}',),
    "text": ("{}", '{"format": {"type": "text"}}'),
    "modalities": ('["text"]',),
    "tool_choice": ('"auto"',),
    "parallel_tool_calls": ("true",),
    "reasoning_effort": ('"none"',),
    "reasoning": ("{}", '{"effort": "none"}'),
    "verbosity": ('"medium"',),
    "logit_bias": ("{}",),
    "truncation": ('"disabled"',),
}
"""For fields that transformers' server leaves aside: values, as JSON, that ask for no more."""

_UNTOLD = frozenset(("context_management", "conversation", "moderation", "reasoning", "verbosity"))
"""Those that it leaves aside without a line in its log; as ``logit_bias`` of plain completions."""


class ServedName(str):
    """The name of the one model that is served; requests may spell it in other ways, too."""

    def __new__(cls, name: str, *others: str) -> ServedName:
        found = super().__new__(cls, name)
        found.spellings = frozenset((name, *others))
        return found

    def __eq__(self, other: object) -> bool:
        return other in self.spellings

    def __ne__(self, other: object) -> bool:
        return other not in self.spellings

    __hash__ = str.__hash__


class _Ready(Serve):
    """A server that is made, and not started yet."""

    def start_server(self) -> None:
        """Later."""


class _Fitting(GenerateManager):
    """Answers end where the language model's positions do; a prompt that leaves none is refused before any word.

    The tokenizer goes on in the processor's place: where words of ``stop`` begin is asked of it.
    """

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, gen_config)
        return super().generate_streaming(model, processor.tokenizer, inputs, gen_config, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor.tokenizer, inputs, gen_config, **kwargs)


def _fit(model: UHDForConditionalGeneration, inputs: Any, gen_config: Any) -> None:
    ids, limit, stop = inputs["input_ids"], model.config.max_positions, gen_config.stop_strings
    words = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"stop is a text, or a list of texts, got {stop!r:.80}")
    gen_config.stop_strings = words or None
    model._check_length(ids, None, model.visual_positions(ids).sum(1).tolist(), new_tokens=1)
    if limit is not None:
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or limit, limit - ids.shape[1])


def _asks_for_what_is_done(check: Any, unused: frozenset[str], body: Any) -> None:
    """Refuse a request for something that the server would leave aside without telling who asks."""
    check(body)
    for field in sorted(unused & set(body)):
        value = body[field]
        if value is not None and field not in _ASIDE and json.dumps(value) not in _AS_IT_IS.get(field, ()):
            raise ValueError(f"this server does not do {field!r}, got {json.dumps(value)!s:.80}: leave it out")


def _in_full(read: Any, messages: Any, *args: Any) -> Any:
    """Read the messages of a request; the server leaves out those parts that it does not know."""
    found = read(messages, *args)
    for message, taken in zip(messages, found, strict=True):
        parts = message.get("content")
        if isinstance(parts, list) and not message.get("tool_calls") and len(parts) != len(taken["content"]):
            kinds = [part["type"] for part in parts]
            raise ValueError(f"parts of a message are of type text, image_url or video_url, got {kinds!r:.200}")
    return found


def _with_addresses_only(apply: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a chat template to messages whose pictures are not files of the server's own machine."""
    if not conversation:
        raise ValueError("messages holds no message: ask something")
    if not isinstance(kwargs.get("tools"), (list, type(None))):
        raise ValueError(f"tools is a list, got {kwargs['tools']!r:.80}")
    for part in (part for message in conversation for part in message["content"]):
        if part["type"] not in ("text", "image", "video"):
            raise ValueError(f"a message holds text, images and videos here, got {part['type']!r:.50}")
        if not isinstance(part.get("text", ""), str):
            raise ValueError(f"the text of a message is a string, got {part['text']!r:.80}")
        part.get("text", "").encode()  # half a character is a ValueError
        address = part.get("url", "data:")
        if not isinstance(address, str) or not _ADDRESS.match(address):
            raise ValueError(f"images and videos come as data: URIs or from http(s)://, got {address!r:.80}")
    return apply(conversation, *args, **kwargs)


def ready(source: Path | str, *, host: str = "127.0.0.1", port: int = 8000, max_pixels: int | None = None) -> _Ready:
    """transformers' server for one model; ``.server.run()`` runs it.

    Args:
        source: A folder that ``save_pretrained`` wrote, or a shipped model's name, by which it is then called.
        host, port: Where it listens.
        max_pixels: Larger pictures are refused; ``None``: as the folder says.

    Raises:
        ValueError, OSError: What is wrong with the folder or the name, in a sentence.
    """
    if isinstance(source, str):
        name, dtype, load = ServedName(source), "float32", load_nano
    else:
        name, dtype, load = _checked(source), "auto", UHDForConditionalGeneration.from_pretrained
    server = _Ready(
        dtype=dtype, model_timeout=-1, chat_template_kwargs=_AS_WORDS, host=host, port=port, non_blocking=True
    )
    manager = server._model_manager
    # not by the manager, which takes an "@" in a path for a revision before 5.24
    model = load(source, dtype=manager.dtype, device_map=manager.device).eval()
    processor = model.processor
    for part in (processor.image_processor, processor.video_processor) if max_pixels is not None else ():
        part.max_pixels = max_pixels
    processor.apply_chat_template = partial(_with_addresses_only, processor.apply_chat_template)
    _pin(manager, name, model, processor)
    for handler in (server._chat_handler, server._response_handler):
        handler.get_processor_inputs_from_messages = partial(_in_full, handler.get_processor_inputs_from_messages)
    for handler in (server._chat_handler, server._completion_handler, server._response_handler):
        unused = _UNTOLD.union(handler._unused_fields, ["logit_bias"] * (handler is server._completion_handler))
        handler._validate_request = partial(_asks_for_what_is_done, handler._validate_request, unused)
    generating = _Fitting()
    server._generation_state.get_manager = lambda *args, **kwargs: generating
    for kind in (ValueError, TemplateError, LookupError, TypeError, AttributeError):
        server.server.config.app.add_exception_handler(kind, refused)
    return server


def _checked(folder: Path) -> ServedName:
    """How a folder's model may be called; a ``ValueError`` where it is none of ours."""
    finish(folder)
    if not is_file(folder / "config.json"):
        raise ValueError(f"{folder} is no folder with a saved model (config.json); a shipped one is --nano NAME")
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if kind != UHDConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r} without these eyes: transformers serve is for it")
    whole = folder.resolve()
    return ServedName(str(folder), whole.name, str(whole), folder.as_posix())


def _pin(manager: Any, name: ServedName, model: Any, processor: Any) -> None:
    """Have a model manager know this one model, loaded, by its name."""

    def known(asked: str) -> str:
        if asked != name:
            raise HTTPException(404, f"there is no model {asked!r:.200} here, this server has {name!r}")
        return str(name)

    manager.force_model = name
    manager.loaded_models = {str(name): TimedModel(model, -1, processor)}
    manager.process_model_name = known
    manager.load_model_and_processor = lambda *args, **kwargs: (model, processor)
    if not hasattr(manager, "list_models"):  # older releases list what was downloaded
        manager.get_gen_models = lambda: [{"id": str(name), "object": "model", "created": 0, "owned_by": ""}]


async def refused(request: Request, problem: Exception) -> JSONResponse:
    """Answer 400 with the sentence that refuses a request; other errors stay errors of the server.

    A request without what the chat API asks for ends in the server's own code: that it is malformed is said here.
    """
    said = str(problem)
    if not isinstance(problem, (ValueError, TemplateError)):
        inmost = traceback.extract_tb(problem.__traceback__)[-1].filename
        if Path(inmost).parent.name not in ("serving", "json") or isinstance(problem, NotImplementedError):
            raise problem
        said = f"the request is not of the form that this API takes ({type(problem).__name__}: {problem})"
    error = {"message": said, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=400)
