"""What attaching eyes to a language model would do, told before anything is built: ``uhd doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from uhd.checkpoint import own_code_named, refuse_pickled, transformers_config
from uhd.environment import attention
from uhd.hf.attach import check_ids, embedding_rms, with_image_token
from uhd.hf.configuration import UHDConfig, max_positions
from uhd.hf.injection import explain_injection
from uhd.schema import SpatialSchema, resolve_schema, resolve_separator
from uhd.slicing import plan

COMMON_SIZES_HW = ((336, 336), (480, 640), (1008, 672), (720, 1280), (1754, 1240), (1080, 1920), (2160, 3840))
"""(height, width), px: from a CLIP input over a page of A4 at 150 dpi to a 4k frame."""

TOKENIZER_FILES = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*", "*vocab*.json", "tekken*.json")

NUMBERED_IMAGES = 10
"""As ``from_vision_and_lm`` does for schemas that number images."""


@dataclasses.dataclass(frozen=True)
class Separator:
    """A symbol's ids, how they were found (:class:`uhd.schema.SeparatorIds`), and their names in the vocabulary."""

    ids: tuple[int, ...]
    how: str
    pieces: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Positions that an image of (height, width) px takes, and whether they fit the language model's."""

    image_hw: tuple[int, int]
    grid: tuple[int, int] | None
    tokens: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        injection: ``"embeds"`` or ``"hook"``; ``None`` where neither works. ``injection_reason`` says why.
        image_token: Placeholder of an image; ``image_token_is_new``: it would be added to the tokenizer.
        separators: By symbol.
        max_positions: The longest sequence by the config, ``None`` where it tells none.
        embedding_rms: Of the output of the input embedding; visual tokens are scaled to it.
        attention: The implementation in use; ``attention_supported``: those that the model's class declares and this
            environment has.
        kernel: What computes the resampler's attention here; ``kernel_reason``: why not another.
        tokens: Counts for common sizes under ``schema``.
        problems: What would keep ``from_vision_and_lm`` from attaching, one sentence each.
    """

    folder: str
    model: str
    model_type: str
    num_parameters: int
    dtype: str
    vocab_size: int
    width: int
    schema: str
    injection: str | None
    injection_reason: str
    image_token: str
    image_token_is_new: bool
    separators: Mapping[str, Separator]
    max_positions: int | None
    embedding_rms: float
    attention: str
    attention_supported: tuple[str, ...]
    kernel: str
    kernel_reason: str
    tokens: tuple[ImageTokens, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def diagnose(folder: str | Path, *, schema: str | SpatialSchema = "llava-uhd") -> Diagnosis:
    """Load a language model from a local folder and say how eyes would be attached to it.

    Nothing is downloaded and nothing is changed.

    Args:
        folder: As ``save_pretrained`` writes it: config, weights, tokenizer.
        schema: Layout whose symbols and counts are told; a preset's name or a schema.

    Raises:
        ValueError: The folder lacks a config, weights or a tokenizer, or the model is no causal language model.
    """
    folder = Path(folder)
    schema = SpatialSchema.preset(schema) if isinstance(schema, str) else schema
    lm, tokenizer = _load(folder)
    vocab_size = lm.config.get_text_config().vocab_size
    problems: list[str] = []
    marked, image_token = with_image_token(tokenizer, None, schema.separators)
    try:
        check_ids(marked, vocab_size)
    except ValueError as problem:
        problems.append(str(problem))
    try:
        mode, reason = explain_injection(lm)
    except ValueError as problem:
        mode, reason = None, str(problem)
        problems.append(reason)
    separators = _separators(marked, schema, image_token, vocab_size, problems)
    limit = max_positions(lm.config)
    kernel, kernel_reason = attention()
    return Diagnosis(
        folder=str(folder),
        model=type(lm).__name__,
        model_type=lm.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in lm.parameters()),
        dtype=str(lm.dtype).removeprefix("torch."),
        vocab_size=vocab_size,
        width=lm.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).shape[-1],
        schema=schema.name,
        injection=mode,
        injection_reason=reason,
        image_token=image_token,
        image_token_is_new=len(marked) > len(tokenizer),
        separators=separators,
        max_positions=limit,
        embedding_rms=embedding_rms(lm),
        attention=str(lm.config._attn_implementation),
        attention_supported=_attention(lm),
        kernel=kernel,
        kernel_reason=kernel_reason,
        tokens=_counts(schema, limit),
        problems=tuple(problems),
    )


def _load(folder: Path) -> tuple[PreTrainedModel, Any]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give a local folder that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that save_pretrained wrote")
    try:
        config = transformers_config(folder)
    except (ValueError, OSError) as problem:
        raise ValueError(f"the config.json of {folder} cannot be read: {_short(problem)}") from problem
    if isinstance(config, UHDConfig):
        raise ValueError(f"{folder} holds a model that has eyes already: give the folder of its language model")
    _check_causal(folder, config)
    refuse_pickled(folder, "a copy whose weights are safetensors")
    own = {"local_files_only": True, "trust_remote_code": False}
    if not any(found for name in TOKENIZER_FILES for found in folder.glob(name)):
        raise ValueError(f"{folder} holds no tokenizer: save it there with tokenizer.save_pretrained(folder)")
    try:
        with own_code_named(folder, "save it with a tokenizer of transformers"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    except Exception as problem:  # tokenizers raise what they like on files they cannot read
        raise ValueError(f"the tokenizer of {folder} cannot be read: {_short(problem)}") from problem
    try:
        lm = AutoModelForCausalLM.from_pretrained(folder, **own, use_safetensors=True, dtype="auto").eval()
    except (OSError, RuntimeError, ValueError, ImportError) as problem:
        raise ValueError(f"the weights of {folder} cannot be loaded: {_short(problem)}") from problem
    return lm, tokenizer


def _check_causal(folder: Path, config: PreTrainedConfig) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r}, which is no causal language model of "
            "AutoModelForCausalLM: eyes need one that generates text from left to right"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{folder} holds an encoder-decoder of type {config.model_type!r}: eyes need a language model without an "
            "encoder"
        )
    for name in config.architectures or ():
        if name.endswith(("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")):
            raise ValueError(
                f"{folder} was saved as {name}, which is no causal language model: eyes need one that generates text "
                "from left to right"
            )


def _separators(
    tokenizer: Any, schema: SpatialSchema, image_token: str, vocab_size: int, problems: list[str]
) -> dict[str, Separator]:
    """Every symbol that can be resolved; what cannot is a problem."""
    symbols = [symbol for symbol in schema.separators if symbol not in schema.learned]
    if schema.image_id is not None:
        symbols += [str(index) for index in range(NUMBERED_IMAGES)]
    found = {}
    for symbol in symbols:
        try:
            ids = resolve_separator(tokenizer, symbol, image_token=image_token)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if max(ids.ids) >= vocab_size:
            problems.append(
                f"the separator {symbol!r} has the ids {ids.ids}, the language model embeds {vocab_size}: resize its "
                "embeddings, or choose with separator_ids"
            )
        pieces = tokenizer.convert_ids_to_tokens(list(ids.ids))
        found[symbol] = Separator(ids.ids, ids.how, tuple(map(str, pieces)))
    if len(found) == len(symbols):
        try:
            resolve_schema(tokenizer, schema, image_token=image_token, num_images=NUMBERED_IMAGES)
        except ValueError as problem:  # two of them cannot be told apart
            problems.append(str(problem))
    return found


def _attention(lm: PreTrainedModel) -> tuple[str, ...]:
    """Implementations that the class declares, where this environment has them."""
    flash = is_flash_attn_2_available()
    declared = {
        "eager": True,
        "sdpa": lm._supports_sdpa,
        "flex_attention": lm._supports_flex_attn,
        "flash_attention_2": lm._supports_flash_attn and flash,
    }
    return tuple(name for name, there in declared.items() if there)


def _counts(schema: SpatialSchema, limit: int | None) -> tuple[ImageTokens, ...]:
    config = schema.slicing_config()
    plans = [plan(size_hw, config) for size_hw in COMMON_SIZES_HW]
    return tuple(
        ImageTokens(found.image_hw, found.grid, found.num_tokens, limit is None or found.num_tokens < limit)
        for found in plans
    )


def table(found: Diagnosis) -> str:
    """The diagnosis for a person; sizes are width x height there."""
    limit = "not told by its config" if found.max_positions is None else f"{found.max_positions:,}"
    rows = [
        (
            "model",
            f"{found.model} ({found.model_type}), {found.num_parameters / 1e6:,.1f} M parameters, {found.dtype}",
        ),
        ("injection", f"{found.injection or 'none works'}: {found.injection_reason}"),
        ("image token", found.image_token + (" (would be added)" if found.image_token_is_new else " (its own)")),
        *(
            (
                f"separator {symbol!r}",
                f"{', '.join(map(str, item.ids))}  {' '.join(map(repr, item.pieces))}  ({_HOW[item.how]})",
            )
            for symbol, item in found.separators.items()
        ),
        ("positions", limit),
        ("embeddings", f"{found.vocab_size:,} x {found.width}, RMS {found.embedding_rms:.4g}"),
        ("attention", f"{found.attention}; also {_others(found)}"),
        ("kernel", f"{found.kernel}: {found.kernel_reason}"),
    ]
    side = max(len(name) for name, _ in rows)
    lines = [found.folder, *(f"  {name:<{side}}  {value}" for name, value in rows), ""]
    lines.append(f"  an image of (width x height)    slices    tokens under schema {found.schema!r}")
    for item in found.tokens:
        height, width = item.image_hw
        slices = "not cut" if item.grid is None else "{}x{}".format(*item.grid)
        over = "" if item.fits else "  more than the model's positions"
        lines.append(f"  {f'{width}x{height}':<30}  {slices:<8}  {item.tokens:>6}{over}")
    lines += [f"\n  problem: {problem}" for problem in found.problems]
    return "\n".join(lines)


_HOW = {
    "probe": "as it stands between image tokens",
    "vocabulary": "by its name in the vocabulary",
    "pieces": "the mean of the pieces it is written with",
    "given": "as chosen",
}


def _others(found: Diagnosis) -> str:
    return ", ".join(name for name in found.attention_supported if name != found.attention) or "nothing else"


def _short(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:299] + "…"
