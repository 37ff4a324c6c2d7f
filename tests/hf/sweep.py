"""What holds for one kind of language model when it gets eyes, and a page that lists it for all kinds.

``python -m tests.hf.sweep KIND ...`` prints the records of single kinds.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.hf.shrink import shrink
from tests.hf.test_models import by_hand
from tests.hf.tiny import IMAGES, TEXTS, attach, encoder, targets
from uhd.hf import UHDForConditionalGeneration, explain_injection

NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CHECKS = {
    "text": "text alone gives the bare model's logits, bit by bit",
    "hand": "loss and logits with images are those of embeddings merged by hand, with the ids beside them and, in the "
    "mode `embeds`, without",
    "seen": "another image gives other logits",
    "cache": "generation with a cache is generation without",
    "padding": "a left-padded batch gives what its samples give alone",
}
ENCODERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "reformer", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod"),
}
"""Registered as causal and tried with ``is_decoder=True``; their checkpoints are no decoders."""


def examine(kind: str) -> dict[str, Any]:
    """The record of a kind: ``built``, ``mode``, and by check ``"ok"`` or what went wrong."""
    record: dict[str, Any] = {"kind": kind}
    try:
        lm = shrink(kind)
    except ValueError as problem:
        return {**record, "built": False, "why": _line(problem.__cause__ or problem)}
    record.update(built=True, model=type(lm).__name__)
    try:
        found = _attach(lm)
    except Exception as problem:  # the page says what a person would read
        return {**record, "mode": None, "why": _line(problem)}
    record["mode"], record["because"] = explain_injection(lm)
    assert record["mode"] == found.config.injection_mode
    for name in CHECKS:
        try:
            with torch.no_grad():
                globals()[f"_{name}"](found)
            record[name] = "ok"
        except Exception as problem:  # likewise
            record[name] = _line(problem)
    return record


def _attach(lm: torch.nn.Module) -> UHDForConditionalGeneration:
    width = lm.get_input_embeddings()(torch.tensor([[1]])).shape[-1]
    return attach(encoder(width), lm)


def _text(found: UHDForConditionalGeneration) -> None:
    ids = found.processor(text=["hello, there"])["input_ids"]
    assert torch.equal(found(input_ids=ids).logits, found.language_model(input_ids=ids).logits), "logits differ"


def _hand(found: UHDForConditionalGeneration) -> None:
    """One sample, so that only the merge is looked at; in both modes also by ids, which some models read again."""
    text, images = TEXTS[2:], IMAGES[1:]
    batch = found.processor(text=text, images=images)
    hand, lm, embed = by_hand(found, text, images), found.language_model, found.get_input_embeddings()
    passed: dict[str, Any] = {"attention_mask": hand.attention_mask, "labels": hand.labels}
    if "position_ids" in inspect.signature(lm.forward).parameters:
        passed["position_ids"] = hand.position_ids
    ours = found(**batch, labels=targets(found, batch))
    image = batch["input_ids"] == found.config.image_token_id
    embed.forward = lambda *_, **__: hand.inputs_embeds
    try:
        theirs = [lm(input_ids=batch["input_ids"].masked_fill(image, found.config.fill_token_id), **passed)]
    finally:
        del embed.forward
    if found.config.injection_mode == "embeds":
        theirs.append(lm(inputs_embeds=hand.inputs_embeds, **passed))
    for other in theirs:
        torch.testing.assert_close(ours.logits, other.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.loss, other.loss, rtol=1e-4, atol=1e-5)


def _seen(found: UHDForConditionalGeneration) -> None:
    one, other = (found(**found.processor(text="<image>?", images=[image])) for image in (IMAGES[0], 255 - IMAGES[0]))
    difference = (one.logits[:, -1] - other.logits[:, -1]).abs().max()
    assert difference > 1e-5 * one.logits.abs().max(), "the image does not reach the last position"


def _cache(found: UHDForConditionalGeneration) -> None:
    batch = found.processor(text=TEXTS[2], images=IMAGES[1:])
    cached, uncached = found.generate(**batch, **NEW), found.generate(**batch, **NEW, use_cache=False)
    assert torch.equal(cached, uncached), (
        f"{cached[0, -4:].tolist()} with a cache, {uncached[0, -4:].tolist()} without"
    )


def _padding(found: UHDForConditionalGeneration) -> None:
    batch = found.processor(text=TEXTS, images=IMAGES)
    together = found(**batch).logits
    generated = found.generate(**batch, **NEW)[:, -4:]
    for row, (text, images) in enumerate(zip(TEXTS, [IMAGES[:1], None, IMAGES[1:]], strict=True)):
        single = found.processor(text=text, images=images)
        alone = found(**single).logits[0]
        kept = together[row][batch["attention_mask"][row].bool()]
        error = ((kept - alone).abs().max() / alone.abs().max()).item()
        assert error < 1e-3, f"logits of sample {row} are off by {error:.1%} of the largest"
        assert torch.equal(generated[row], found.generate(**single, **NEW)[0, -4:]), f"sample {row} goes on otherwise"


def _line(problem: BaseException, limit: int = 220) -> str:
    text = " ".join(str(problem).split()) or "no message"
    text = text if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _child(kind: str, path: str) -> None:
    """In a process of its own, forked off one that has everything imported."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Path(path).write_text(json.dumps(examine(kind)), encoding="utf-8")


def sweep(
    kinds: Sequence[str], folder: Path, *, timeout_s: float = 120, say: Callable[[str], object] = lambda line: None
) -> Iterator[dict[str, Any]]:
    """Records of many kinds, each examined in its own process; a kind that hangs or dies is one record, no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hf.sweep"])
    for kind in kinds:
        path = folder / f"{kind}.json"
        process = context.Process(target=_child, args=(kind, str(path)))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            record = {"kind": kind, "built": False, "why": f"took more than {timeout_s:.0f} s"}
        elif path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            record = {"kind": kind, "built": False, "why": f"the process ended with {process.exitcode}"}
        say(json.dumps(record, ensure_ascii=False))
        yield record


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page of these records, in Markdown."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in ("embeds", "hook", "part", "none", "unbuilt")}
    for record in sorted(records, key=lambda record: record["kind"]):
        groups[_group(record)].append(record)
    works = groups["embeds"] + groups["hook"]
    decoders = sum(record["kind"] not in ENCODERS for record in works)
    lines = [
        "# Which causal language models can be given eyes",
        "",
        f"{len(records)} model types that transformers registers for `AutoModelForCausalLM`, each built tiny from its "
        "config with random weights (parameters that start as a constant get noise, so that no branch is silent) and "
        f"attached with `from_vision_and_lm`. Written by `pytest -m slow tests/hf/test_sweep.py` under {_versions()}. "
        "It says what the code of a type does; no pretrained checkpoint was run.",
        "",
        f"**{len(works)} work in full** ({decoders} without the starred encoders): {len(groups['embeds'])} by "
        f"`inputs_embeds`, {len(groups['hook'])} by the embedding hook. {len(groups['part'])} work in part, "
        f"{len(groups['none'])} do not, {len(groups['unbuilt'])} were not "
        "built. In full means that",
        "",
        *(f"* {text}{';' if name != list(CHECKS)[-1] else '.'}" for name, text in CHECKS.items()),
        "",
        "A type with a star is an encoder in its checkpoints, tried here with `is_decoder=True`.",
        "",
        f"## By `inputs_embeds` ({len(groups['embeds'])})",
        "",
        ", ".join(_name(record) for record in groups["embeds"]),
        "",
        *_table(f"By the embedding hook ({len(groups['hook'])})", "why not `inputs_embeds`", groups["hook"], _because),
        *_table(f"In part ({len(groups['part'])})", "what fails", groups["part"], _failures),
    ]
    lines += [
        "Where only the left-padded batch fails, the model takes no positions, or no padding mask, from outside: give "
        "it one sample at a time, or samples of equal length.",
        "",
        *_table(f"Does not work ({len(groups['none'])})", "why", groups["none"], lambda record: record["why"]),
        *_table(f"Not built ({len(groups['unbuilt'])})", "why", groups["unbuilt"], lambda record: record["why"]),
        "Not built means that the generic tiny config did not suit the type (a draft model, a parent of audio parts): "
        "nothing is known about it.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _group(record: dict[str, Any]) -> str:
    if not record["built"]:
        return "unbuilt"
    if record["mode"] is None:
        return "none"
    return record["mode"] if all(record[name] == "ok" for name in CHECKS) else "part"


def _table(title: str, column: str, records: Sequence[dict[str, Any]], cell: Callable[[dict], str]) -> list[str]:
    rows = [f"| {_name(record)} | {cell(record).replace('|', chr(92) + '|')} |" for record in records]
    return [f"## {title}", "", f"| type | {column} |", "|---|---|", *rows, ""] if rows else []


def _name(record: dict[str, Any]) -> str:
    return f"`{record['kind']}`" + "*" * (record["kind"] in ENCODERS)


def _because(record: dict[str, Any]) -> str:
    return record["because"]


def _failures(record: dict[str, Any]) -> str:
    names = {"hand": "loss by hand", "cache": "cache", "padding": "left-padded batch", "seen": "image", "text": "text"}
    failed = [f"{names[name]}: {record[name]}" for name in CHECKS if record[name] != "ok"]
    return f"{record['mode']}; " + "; ".join(failed)


def _versions() -> str:
    return f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}, on the CPU, float32"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        print(json.dumps(examine(name), indent=1, ensure_ascii=False))
