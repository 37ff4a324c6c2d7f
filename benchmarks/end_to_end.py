"""From JPEG bytes to visual tokens as wide as a language model, beside three front ends of transformers.

    python benchmarks/end_to_end.py [--all] [--width 384] [--depth 4] [--dtypes fp32 bf16] [--repeats 3] [--out FOLDER]

Each peer is a model of transformers in its released geometry (sides of views, grids, patches of 14 px) with random
weights and a small ViT; `uhd.pretrained.load` reads the same folder. So both have one rule, one set of weights and as
many patches, and nothing is timed before the tokens are equal: in float32 but for rounding where the pixels are the
same, to 2e-2 where they were resized otherwise (transformers' two processors are as far from each other); in bfloat16
to twice transformers' own distance from float32. A peer can be given a JPEG in three ways, by its processor on
torchvision or on Pillow, and by who decodes: the fastest on that input counts. "llava-uhd" is our own rule with a
perceiver behind LLaVA-NeXT's ViT: another number of patches, so it is also compared per patch.

LLaVA-NeXT reads its last layer here. As released it reads the one before; transformers computes the last all the same
and uhd does not, which is one block of 24 there and too large a share of this ViT.

Times are process CPU time of one thread, contenders in turn, medians; what is compiled is compiled before. It takes
five minutes of one core for two inputs, twice that for all four.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from preprocess import jpeg, made_picture, versions  # the first import: it says OMP_NUM_THREADS=1

# isort: split
import torch
import transformers
from end_to_end_peers import EXACT_WAY, HEAD_DIM, LM_WIDTH, MAKERS, Peer, make_peer, scatter
from PIL import Image
from reporting import DTYPES, ROUNDING, SLACK, cpu_times, device, gemm_rate, options, relative, reported
from torch import Tensor

import uhd
from uhd.charts import curves, log_axis
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import vit_from

AIMS = {"fp32": 1.3, "bf16": 1.2}
RESIZED = 2e-2
SHORT = ("made 672x1008", "4 images")  # inputs, without --all
OWN_RULE, OWN_PEER = "llava-uhd", "LLaVA-NeXT"


def with_pixels(encoder: uhd.VisualEncoder, **changes: Any) -> uhd.VisualEncoder:
    """The same modules behind other pixel settings."""
    other = copy.copy(encoder)
    other.pixels = dataclasses.replace(encoder.pixels, **changes)
    return other


OURS: dict[str, Callable[[uhd.VisualEncoder], uhd.VisualEncoder]] = {
    "uhd": lambda encoder: encoder,
    "uhd, fast pixels": partial(with_pixels, backend="fast"),
    "uhd, fast pixels, compiled": lambda encoder: copy.deepcopy(with_pixels(encoder, backend="fast")).compile(),
}
"""What is made of an encoder that has its dtype already."""


class Contender(NamedTuple):
    """Whose time is taken. Tokens of one ``rule`` are equal; its time is compared with that of ``peer``."""

    name: str
    peer: str
    rule: str
    call: Callable[[list[bytes]], list[Tensor]]
    patches: Callable[[list[bytes]], int]
    bound: float  # on the relative error in float32


def inputs() -> dict[str, list[bytes]]:
    """Two made pictures, a photograph, and a batch of four sizes and aspects."""
    import skimage.data

    four = [skimage.data.chelsea(), made_picture(480, 160), made_picture(224, 168), made_picture(280, 560)]
    return {
        "made 672x1008": [jpeg(made_picture(672, 1008))],
        "made 1080x1920": [jpeg(made_picture(1080, 1920))],
        "rocket 427x640": [jpeg(skimage.data.rocket())],
        "4 images": [jpeg(pixels) for pixels in four],
    }


def megapixels(images: list[bytes]) -> float:
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    return sum(width * height for width, height in sizes) / 1e6


def own_encoder(peers: Sequence[Peer]) -> uhd.VisualEncoder:
    """Our planner and a new perceiver behind a peer's ViT, in float32."""
    peer = next(peer for peer in peers if peer.name == OWN_PEER)
    vit = vit_from(peer.model.model.vision_tower, select_layer=-1).float()
    torch.manual_seed(1)
    heads = LM_WIDTH // 128
    compressor = PerceiverResampler(PerceiverConfig(width=LM_WIDTH, vision_width=vit.out_dim, num_heads=heads))
    scatter(compressor)
    return uhd.VisualEncoder(vit, compressor, pixels=uhd.pretrained.load(peer.folder).pixels).eval()


def our_contenders(encoder: uhd.VisualEncoder, peer: str, rule: str) -> list[Contender]:
    found = []
    for name, change in OURS.items():
        ours = change(encoder)
        exact = ours.pixels.backend == "pillow"
        if exact and rule == OWN_RULE:
            continue  # what the others are compared with
        found.append(
            Contender(
                name if rule != OWN_RULE else f"{name}, perceiver",
                peer,
                rule,
                lambda images, ours=ours: [item.tokens for item in ours(images)],
                lambda images, ours=ours: len(ours.prepare(images).patches),
                ROUNDING if exact else RESIZED,
            )
        )
    return found


def entrants(peers: Sequence[Peer], dtype: torch.dtype) -> list[Contender]:
    """All of ours; of transformers the way that counts is chosen by input."""
    encoders = [(peer.name, peer.name, uhd.pretrained.load(peer.folder)) for peer in peers]
    encoders.append((OWN_PEER, OWN_RULE, own_encoder(peers)))
    return [entry for peer, rule, encoder in encoders for entry in our_contenders(encoder.to(dtype), peer, rule)]


class Picked(NamedTuple):
    """The way in which transformers are fastest on an input, and the milliseconds of all ways up to the pixels."""

    contender: Contender
    processing_ms: dict[str, float]


def fastest(peer: Peer, images: list[bytes], repeats: int) -> Picked:
    """By the time to the pixels, since what the model does then is the same."""
    calls = {name: partial(way, images) for name, way in peer.ways.items()}
    cpu_times(calls, 1)
    times = cpu_times(calls, repeats)
    way = min(times, key=times.__getitem__)
    entry = Contender(
        f"transformers, {way}", peer.name, peer.name, partial(peer.tokens, way=way), peer.patches, RESIZED
    )
    return Picked(entry, {name: round(1e3 * taken, 1) for name, taken in times.items()})


class Input(NamedTuple):
    """What is encoded, what should come out by every rule, and each peer's fastest way."""

    name: str
    images: list[bytes]
    truths: dict[str, list[Tensor]]
    picked: list[Picked]


def errors(entries: Sequence[Contender], given: Input, dtype: str) -> list[tuple[int, float]]:
    """(number of tokens, relative error) of each; transformers come first. Also everyone's first call.

    Raises:
        RuntimeError: tokens are not what the peer makes on Pillow in float32.
    """
    found: list[tuple[int, float]] = []
    theirs: dict[str, float] = {}  # what transformers are off in this dtype
    for entry in entries:
        tokens, truth = entry.call(given.images), given.truths[entry.rule]
        lengths, wanted = [len(part) for part in tokens], [len(part) for part in truth]
        if lengths != wanted:
            raise RuntimeError(f"{entry.name}, {entry.rule}: {lengths} tokens an image instead of {wanted}")
        off = relative(torch.cat(tokens), torch.cat(truth))
        if entry.name.startswith("transformers"):
            theirs[entry.rule] = off
        bound = entry.bound
        if dtype != "fp32":
            bound = SLACK * theirs.get(entry.rule, max(theirs.values()))
        if not off <= bound:
            raise RuntimeError(f"{entry.name}, {entry.rule}, {dtype}: tokens are off by {off:.1e}, above {bound:.1e}")
        found.append((sum(lengths), off))
    return found


def measure(given: Input, dtype: str, ours: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """A row for every contender on one input."""
    entries = [*(pick.contender for pick in given.picked), *ours]
    checked = errors(entries, given, dtype)
    times = cpu_times({str(n): partial(entry.call, given.images) for n, entry in enumerate(entries)}, repeats)
    taken, counts = list(times.values()), [entry.patches(given.images) for entry in entries]
    peers = {entry.peer: number for number, entry in enumerate(entries[: len(given.picked)])}
    rows = []
    for number, entry in enumerate(entries):
        peer, (tokens, off) = peers[entry.peer], checked[number]
        ratio = taken[peer] / taken[number]
        rows.append(
            {
                "input": given.name,
                "megapixels": round(megapixels(given.images), 3),
                "dtype": dtype,
                "rule": entry.rule,
                "contender": entry.name,
                "compared_with": entry.peer,
                "patches": counts[number],
                "tokens": tokens,
                "cpu_ms": round(1e3 * taken[number], 1),
                "ms_per_1000_patches": round(1e6 * taken[number] / counts[number], 1),
                "ratio": round(ratio, 3),
                "ratio_per_patch": round(ratio * counts[number] / counts[peer], 3),
                "relative_error": float(f"{off:.1e}"),
                "processing_ms": given.picked[number].processing_ms if number < len(peers) else None,
            }
        )
    return rows


def run(width: int, depth: int, dtypes: list[str], repeats: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Everything that is written, as plain JSON types."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        peers = [make_peer(name, width, depth, Path(folder) / name) for name in MAKERS]
        given, own = [], own_encoder(peers)
        for name, images in inputs().items():
            if names is not None and name not in names:
                continue
            truths = {peer.name: peer.tokens(images, EXACT_WAY) for peer in peers}
            truths[OWN_RULE] = [item.tokens for item in own(images)]
            given.append(Input(name, images, truths, [fastest(peer, images, repeats) for peer in peers]))
        for dtype in (name for name in DTYPES if name in dtypes):
            for peer in peers:
                peer.model.to(DTYPES[dtype])
            ours = entrants(peers, DTYPES[dtype])
            for each in given:
                rows += measure(each, dtype, ours, repeats)
    return {
        "about": f"JPEG bytes to tokens of width {LM_WIDTH}; ViT of width {width}, {depth} blocks, "
        f"{width // HEAD_DIM} heads; median process CPU time of {repeats} calls in turn, one thread; ratio: "
        "transformers' fastest way / this",
        "versions": {"uhd": uhd.__version__, **versions()},
        "device": device(),
        "gemm_gflops": {name: round(gemm_rate(DTYPES[name]) / 1e9) for name in dtypes},
        "rows": rows,
        "targets": [reached(rows, peer, dtype, name) for dtype in dtypes for peer in MAKERS for name in OURS],
    }


def reached(rows: list[dict[str, Any]], peer: str, dtype: str, name: str) -> dict[str, Any]:
    """One contender of ours on all inputs, by a peer's rule."""
    ratios = [row["ratio"] for row in rows if (row["rule"], row["dtype"], row["contender"]) == (peer, dtype, name)]
    return {
        "rule": peer,
        "dtype": dtype,
        "contender": name,
        "least": min(ratios),
        "median": round(statistics.median(ratios), 3),
        "aim": AIMS[dtype],
        "never_slower": min(ratios) >= 1,
        "aim_reached": min(ratios) >= AIMS[dtype],
    }


def table(result: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = [
        "| input | dtype | rule | | patches | tokens | CPU ms | ms per 1000 patches | ratio | per patch | error |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = {rule: number for number, rule in enumerate([*MAKERS, OWN_RULE])}
    for row in sorted(result["rows"], key=lambda row: (row["dtype"] != "fp32", row["input"], order[row["rule"]])):
        lines.append(
            f"| {row['input']} | {row['dtype']} | {row['rule']} | {row['contender']} | {row['patches']} | "
            f"{row['tokens']} | {row['cpu_ms']:.0f} | {row['ms_per_1000_patches']:.0f} | {row['ratio']:.2f} | "
            f"{row['ratio_per_patch']:.2f} | {row['relative_error']:.0e} |"
        )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Over all inputs, as Markdown: the least and the median ratio of each of ours."""
    lines = ["| front end | dtype | | least | median | never slower | aim |", "|---|---|---|---:|---:|---|---|"]
    for row in result["targets"]:
        aim = f"{row['aim']}: {'reached' if row['aim_reached'] else 'missed'}"
        lines.append(
            f"| {row['rule']} | {row['dtype']} | {row['contender']} | {row['least']:.2f} | {row['median']:.2f} | "
            f"{'yes' if row['never_slower'] else 'no'} | {aim} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> str:
    """The ratio of the fastest of ours, over the input's size: a line for each peer and dtype."""
    best: dict[str, dict[float, float]] = {}
    for row in result["rows"]:
        if row["rule"] in MAKERS and not row["contender"].startswith("transformers"):
            line = best.setdefault(f"{row['rule']}, {row['dtype']}", {})
            line[row["megapixels"]] = max(row["ratio"], line.get(row["megapixels"], 0))
    series = {name: sorted(line.items()) for name, line in best.items()}
    points = [point for line in series.values() for point in line]
    x = log_axis([x for x, _ in points], "megapixels of the input")
    return curves(series, x, log_axis([0.5, 2, *(y for _, y in points)], "times faster than transformers"))


def main(argv: list[str] | None = None) -> int:
    """Write ``end_to_end.json`` and ``end_to_end.svg``, print the tables; 1 where tokens are not equal."""
    parser = options(__doc__, repeats=3)
    parser.add_argument("--all", action="store_true", help="all four inputs")
    parser.add_argument("--width", type=int, default=384, help=f"of the ViT, a multiple of {HEAD_DIM}")
    parser.add_argument("--depth", type=int, default=4, help="its blocks")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torchvision's decoder, which the peers need
    transformers.utils.logging.disable_progress_bar()
    try:
        return reported(
            lambda: run(args.width, args.depth, args.dtypes, args.repeats, None if args.all else SHORT),
            args.out / "end_to_end.json",
            lambda result: f"{table(result)}\n\n{summary(result)}",
            drawings=lambda result: {"end_to_end.svg": plot(result)},
            circumstances=("versions", "device", "gemm_gflops"),
        )
    finally:
        transformers.utils.logging.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
