"""Training on packed rows beside training on padded batches: samples a CPU second, and whether they learn the same.

    python benchmarks/packing.py [--samples 2000] [--width 256] [--depth 4] [--max-tokens 768] [--out FOLDER]

Samples: text of log-normal length (median 60 tokens, sigma 0.8), a third without an image, the others with 1 to 3
images of the sizes of the nano model's task (docs/learned.md). They are prepared before; a step collates 16 of them,
runs a small Llama with a small ViT and a perceiver forward and backward, and steps AdamW. Three models from one seed
take turns: padded batches in random order, the same samples packed, and padded batches of samples of like length.

First, logits of packed samples are compared with those of the samples alone; where they differ, nothing is reported.
The first two see the same samples in every step, so their losses must be the same but for rounding. Times are process
CPU time of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from preprocess import versions
from reporting import device, measured, written
from transformers import AutoModelForCausalLM, LlamaConfig

import uhd
from uhd.hf import PackingCollator, UHDForConditionalGeneration, together
from uhd.nano.build import IMAGE, character_tokenizer
from uhd.nano.task import scene
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

SENTENCE = "one image may be cut into slices of any size, and each slice becomes as many tokens as it needs. "
PER_STEP, LATENTS, MEDIAN, SIGMA = 16, 16, 60, 0.8
Sample = dict[str, torch.Tensor]
PADDED, PACKED, SORTED = "padded, random order", "packed", "padded, by length"


def model(width: int, depth: int) -> UHDForConditionalGeneration:
    """A small model, always the same."""
    torch.manual_seed(0)
    sizes = {"image_size": 56, "patch_size": 14, "position_grid_hw": (4, 4)}
    vision = ViT(ViTConfig(**sizes, width=64, depth=2, heads=2, mlp_width=128))
    compressor = PerceiverResampler(
        PerceiverConfig(width=width, vision_width=64, num_heads=width // 64, num_latents=LATENTS)
    )
    tokenizer = character_tokenizer()
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            max_position_embeddings=8192,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    eyes = uhd.VisualEncoder(vision, compressor, pixels=PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3))
    return UHDForConditionalGeneration.from_vision_and_lm(eyes, lm, tokenizer, image_token=IMAGE).train()


def made(processor: Any, count: int, seed: int = 0) -> list[Sample]:
    """Prepared samples of the stated distribution."""
    rng, samples = np.random.default_rng(seed), []
    for number in range(count):
        length = max(2, round(float(rng.lognormal(np.log(MEDIAN), SIGMA))))
        start = int(rng.integers(len(SENTENCE)))
        text = (SENTENCE * (2 + (start + length) // len(SENTENCE)))[start : start + length]
        count_here = 0 if number % 3 == 0 else int(rng.integers(1, 4))
        images = [scene(seed, 3 * number + place).image for place in range(count_here)]
        samples.append(dict(processor(text=IMAGE * len(images) + text, images=images or None)))
    return samples


def padded(processor: Any, samples: list[Sample]) -> dict[str, Any]:
    """What a collator without packing makes: rows as long as the longest, filled on the left."""
    rows = [sample["input_ids"][0] for sample in samples]
    length, pad = max(map(len, rows)), processor.tokenizer.pad_token_id
    ids = torch.stack([torch.cat([row.new_full((length - len(row),), pad), row]) for row in rows])
    places = torch.stack([torch.arange(length) - (length - len(row)) for row in rows])
    mask = (places >= 0).long()
    labels = ids.masked_fill((places <= 0) | (ids == processor.image_token_id), -100)  # nothing foretells the first
    visual = PackingCollator(processor, max_length=10**6)([samples]).get("visual")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **({"visual": visual} if visual else {})}


def check(found: UHDForConditionalGeneration, collate: PackingCollator, samples: list[Sample]) -> float:
    """How far logits of packed samples are from those of the samples alone, over the largest."""
    batch = collate(samples)
    with torch.no_grad():
        packed = found(**batch).logits
        ends = {}
        for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                ends[tuple(ids[start:end].tolist())] = packed[row, start:end]
        worst = 0.0
        for sample in samples:
            alone = found(**together(sample), use_cache=False).logits[0]
            packed_alone = ends[tuple(sample["input_ids"][0].tolist())]
            worst = max(worst, ((packed_alone - alone).abs().max() / alone.abs().max()).item())
    return worst


def run(samples: int, width: int, depth: int, max_tokens: int) -> dict[str, Any]:
    """Train the three side by side.

    Raises:
        RuntimeError: Packed samples are not what they are alone, or the curves part.
    """
    models = {name: model(width, depth) for name in (PADDED, PACKED, SORTED)}
    processor = models[PACKED].processor
    prepared = made(processor, samples)
    collate = PackingCollator(processor, max_length=max_tokens)
    difference = check(models[PACKED], collate, prepared[:PER_STEP])
    if difference > 1e-4:
        raise RuntimeError(f"packed samples are off by {difference:.1e} of the largest logit")
    optimizers = {name: torch.optim.AdamW(found.parameters(), lr=3e-4) for name, found in models.items()}
    by_length = sorted(prepared, key=lambda sample: sample["input_ids"].shape[1])
    batches = [by_length[start : start + PER_STEP] for start in range(0, samples, PER_STEP)]
    order = np.random.default_rng(1).permutation(len(batches)).tolist()
    seconds, losses, tokens, real = ({name: [] for name in models} for _ in range(4))
    for step, place in enumerate(order):
        drawn = prepared[step * PER_STEP : (step + 1) * PER_STEP]
        for name, found in models.items():
            used = batches[place] if name == SORTED else drawn
            begin = time.process_time()
            batch = collate(used) if name == PACKED else padded(processor, used)
            loss = found(**batch).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.process_time() - begin)
            losses[name].append(loss.item())
            tokens[name].append(batch["input_ids"].numel())
            real[name].append(sum(sample["input_ids"].shape[1] for sample in used))
    apart = max(abs(a - b) for a, b in zip(losses[PADDED], losses[PACKED], strict=True))
    rows = [
        {
            "batches": name,
            "samples_a_second": samples / sum(seconds[name]),
            "full": sum(real[name]) / sum(tokens[name]),
            "first_loss": losses[name][0],
            "last_loss": float(np.mean(losses[name][-10:])),
        }
        for name in models
    ]
    for row in rows:
        row["ratio"] = row["samples_a_second"] / rows[0]["samples_a_second"]
    about = (
        f"{samples} samples, {PER_STEP} a step, mean {sum(real[PACKED]) / samples:.0f} tokens, rows of at most "
        f"{max_tokens}; Llama {depth} x {width}; losses of padded and packed differ by at most {apart:.1e}"
    )
    return {
        "about": about,
        "rows": rows,
        "losses": losses,
        "difference": difference,
        "versions": versions(),
        "device": device(),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| batches | samples a CPU second | ratio | full | last loss |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        numbers = f"{row['samples_a_second']:.1f} | {row['ratio']:.2f} | {row['full']:.1%} | {row['last_loss']:.3f}"
        lines.append(f"| {row['batches']} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write ``packing.json``, print the table; 1 where packed samples are not what they are alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help=f"a multiple of {PER_STEP}")
    parser.add_argument("--width", type=int, default=256, help="of the language model, a multiple of 64")
    parser.add_argument("--depth", type=int, default=4, help="its layers")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a packed row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    result = measured(lambda: run(args.samples, args.width, args.depth, args.max_tokens))
    if result is None:
        return 1
    written(result, args.out / "packing.json", {})
    print(f"\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
