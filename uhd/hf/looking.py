"""Where a model looked while it wrote: for each generated token a map over its images.

The language model's attention says how much a new token took of each visual token, and
:meth:`uhd.VisualEncoder.attention` where that one had looked. Both are means over heads and layers. Attention is a
hint at what an answer was read from, and no proof.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uhd.attention import map_numbers
from uhd.batch import SliceBatch
from uhd.hf.placing import match
from uhd.hf.versions import take_cache
from uhd.hf.visual_inputs import PlannedMedia, VisualInputs, read_images
from uhd.schema.counted import planned_layout

DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings of ``generate`` under which several tokens are drafted and checked at once."""


def generate_looking(
    model: Any, asked: Callable[[str], Any], inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]
) -> Any:
    """What ``generate(..., return_visual_attention=True)`` does.

    Args:
        model: Of :class:`uhd.UHDForConditionalGeneration`, whose language model attends by ``"eager"``.
        asked: Tells a setting of the generation by name.
        inputs, generation_config: As of ``generate``.
        kwargs: The same, and two of this module's: ``visual_attention_size``, (h, w) of the maps, else as
            :meth:`uhd.VisualEncoder.attention` chooses it for each image; ``visual_attention_layers``, numbers of the
            language model's attention layers to take, else all.

    Returns:
        The language model's output with fields, whatever ``return_dict_in_generate`` says, and two more among them.
        ``visual_attention``: for each row a list with a map (new tokens, h, w) for each of its images; for each token
        they sum to 1 over the row's images. ``visual_attention_share``, (rows, new tokens): how much of the token's
        attention went to visual tokens; the rest was text, separators and learned newlines. What a row has behind its
        end is of padding. The attention of all steps is held meanwhile: layers * heads * prompt**2 numbers a row.

    Raises:
        ValueError: The language model tells no weights, or another way of attending does not; it has no such layers;
            images that were encoded before, videos; beams, drafts, a cache.
    """
    size_hw, layers = kwargs.pop("visual_attention_size", None), kwargs.pop("visual_attention_layers", None)
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    planned = _checked(model, input_ids, layers, asked, kwargs)
    positions = model.visual_positions(input_ids)
    match(positions.sum(1).tolist(), planned.lengths)  # raises where images and their positions do not agree
    maps = model.visual.attention(SliceBatch.from_patches(planned.patches, planned.plans), size_hw)
    told = {**kwargs, "output_attentions": True, "return_dict_in_generate": True}
    out = model.generate(inputs, generation_config, **told)
    weights = _prompt_weights(out["attentions"], input_ids.shape[1], layers)
    samples: list[list[tuple[int, Tensor]]] = [[] for _ in input_ids]
    for number, place in enumerate(positions.nonzero().split(planned.lengths)):
        numbers = map_numbers(planned.plans[number], planned_layout(planned.plans[number], model.visual.schema))
        of_maps = torch.empty(len(maps[number]), dtype=torch.long)
        of_maps[numbers[numbers >= 0]] = place[numbers >= 0, 1]
        samples[int(place[0, 0])].append((number, of_maps))
    found, shares = [], []
    for row, own in enumerate(weights):  # a sample has several rows where several answers were asked for
        images = samples[row * len(samples) // len(weights)]
        parts = [own[:, columns] for _, columns in images]
        shares.append(sum((part.sum(1) for part in parts), own.new_zeros(len(own))))
        whole = shares[-1].clamp_min(torch.finfo(own.dtype).tiny)[:, None]
        found.append(
            [
                torch.einsum("nt,thw->nhw", part / whole, maps[number].to(part))
                for part, (number, _) in zip(parts, images, strict=True)
            ]
        )
    kept = {name: value for name, value in out.items() if name != "attentions" or asked("output_attentions")}
    result = type(out)(**kept)
    result["visual_attention"], result["visual_attention_share"] = found, torch.stack(shares)
    return result


def _checked(
    model: Any,
    input_ids: Tensor | None,
    layers: Sequence[int] | None,
    asked: Callable[[str], Any],
    kwargs: dict[str, Any],
) -> PlannedMedia:
    """The images, or a ``ValueError`` where it cannot be told where new tokens look."""
    lm, visual = model.language_model, VisualInputs.take(dict(kwargs))
    name, how = type(lm).__name__, getattr(lm.config.get_text_config(), "_attn_implementation", None)
    if how != "eager":
        raise ValueError(
            f"return_visual_attention: {name} attends by {how!r}, which tells no weights: call "
            "model.language_model.set_attn_implementation('eager') before"
        )
    token = torch.full((1, 1), model.config.fill_token_id, device=model.get_input_embeddings().weight.device)
    told = getattr(lm(input_ids=token, output_attentions=True), "attentions", None)
    tried = [layer for layer in told or () if layer is not None]
    if not any(layer.dim() == 4 for layer in tried):  # a state is no attention
        raise ValueError(f"return_visual_attention: {name} gives no attention weights, also where it is asked to")
    if layers is not None:
        _check_layers(layers, len(tried))
    if input_ids is None or visual.kinds != {"image"} or visual.image_tokens is not None:
        raise ValueError(
            "return_visual_attention: give input_ids and the pixel_values of images; there are no maps of videos, nor "
            "of images that were encoded before"
        )
    refused = [setting for setting in DRAFTS if asked(setting)] + ["num_beams"] * ((asked("num_beams") or 1) > 1)
    refused += ["a cache"] if take_cache(dict(kwargs)) is not None else []
    refused += ["prompt learning"] if model.steps_are_prepared else []
    if refused:
        raise ValueError(
            f"return_visual_attention: not with {', '.join(refused)}, where steps are not one new token each after "
            "the whole prompt"
        )
    return read_images(model.visual, visual)


def _check_layers(layers: Any, count: int) -> None:
    try:
        wrong = not len(layers) or any(not -count <= operator.index(layer) < count for layer in layers)
    except TypeError:
        wrong = True
    if wrong:
        raise ValueError(
            f"visual_attention_layers is a list of numbers in {-count}..{count - 1}, as {count} layers attend; got "
            f"{layers!r}"
        )


def _prompt_weights(attentions: Any, length: int, layers: Sequence[int] | None) -> Tensor:
    """What each new token took of each position of the prompt, mean of heads and layers: (rows, new tokens, length).

    Layers that do not attend, or no longer to all of the prompt, count as far as they do.
    """
    steps = []
    for number, of_layers in enumerate(attentions):
        some = [layer for layer in of_layers if layer is not None]
        rows = []
        for weights in some if layers is None else [some[layer] for layer in layers]:
            last = weights[:, :, -1].float().mean(1)[:, : length + number]
            rows.append(torch.nn.functional.pad(last, (length + number - last.shape[1], 0))[:, :length])
        steps.append(torch.stack(rows).mean(0))
    return torch.stack(steps, dim=1)
