"""The padded form and its inputs against the packed encoder, and what is refused: no exporter is needed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import uhd
from tests.export.parts import PAIRS, encoder, images, tokens_of
from tests.tiny import IMAGES, PIXELS, refuses, stirred, tiny_encoder, vit
from uhd.export.graph import described
from uhd.export.host import Graph, block_order, inputs
from uhd.export.padded import PaddedEncoder
from uhd.grids import join_blocks
from uhd.positions import bucket_position_ids
from uhd.resampler import PoolProjector
from uhd.vision import ViT
from uhd.writing import new_file

ROOT = Path(__file__).parents[2]


def description(folder, made, **changes):
    path = folder / "model.json"
    with new_file(path) as new:
        new.write_text(json.dumps(described(made, **changes).to_dict()))
    return path


def padded(made, given):
    with torch.inference_mode():
        found = PaddedEncoder(made.vision, made.compressor)({name: torch.from_numpy(x) for name, x in given.items()})
    return found.numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_padded_views_have_the_encoders_tokens(name, tmp_path):
    made = encoder(name)
    given = inputs(images(), description(tmp_path, made))
    wanted = tokens_of(made, images())
    assert given["mask"].sum(1).min() < given["mask"].shape[1]
    np.testing.assert_allclose(padded(made, given), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["clip, paper", "timm clip, pixel shuffle", "minicpm-v-4.6, merge"])
def test_a_fixed_shape_fills_up_and_refuses_more(name, tmp_path):
    made = encoder(name)
    path = description(tmp_path, made, dynamic=False)
    graph = Graph.read(path)
    for image in images():
        given = inputs([image], path)
        assert given["patches"].shape[:2] == given["mask"].shape == (graph.views, graph.length)
        wanted = tokens_of(made, [image])
        found = padded(made, given)[: len(wanted), : wanted.shape[1]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    refuses("do not fit this graph", inputs, images(), path)


@pytest.mark.parametrize("rule", ["transformers", "remote"])
def test_buckets_of_either_float_rule_are_known_to_the_bit(rule):
    graph = described(encoder_of(bucket_rule=rule, interpolation="nearest", position_grid_hw=(70, 70)))
    off = 0
    for rows, columns in [(n, 3000 // n) for n in range(2, 200)]:
        wanted = bucket_position_ids((rows, columns), 70, rule).numpy()
        found = graph.positions.buckets(rows, 70)[:, None] * 70 + graph.positions.buckets(columns, 70)
        np.testing.assert_array_equal(found.ravel(), wanted)
        off += (wanted != bucket_position_ids((rows, columns), 70).numpy()).any()
    assert off or rule == "transformers"  # which rounds as integers do nearly everywhere
    refuses("3000 patches a side is more than the 2048", graph.positions.buckets, 3000, 70)


def encoder_of(**changes):
    return tiny_encoder(vision=stirred(vit(**changes)))


def test_blocks_of_blocks_are_in_the_order_of_repeated_joins():
    numbers = torch.arange(32)[:, None]
    once = join_blocks(numbers, [(4, 8)], 2)
    twice = join_blocks(once.flatten(1), [(2, 4)], 2).flatten(1)
    np.testing.assert_array_equal(block_order((4, 8), (2,)), once.squeeze(-1))
    np.testing.assert_array_equal(block_order((4, 8), (2, 2)), twice)
    refuses("6 x 4 patches cannot be joined by 4", block_order, (6, 4), (2, 2))


WITHOUT_TORCH = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise RuntimeError(f"{{name}} is imported")
sys.meta_path.insert(0, Refused())
"""


def run_without(code, folder, refused=("torch", "transformers", "timm")):
    """Python in a process in which importing any of these raises."""
    code = WITHOUT_TORCH.format(refused=set(refused)) + code
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_inputs_are_made_where_torch_cannot_be_imported(tmp_path):
    made = encoder("siglip, minicpm-v-2.0")
    description(tmp_path, made)
    for number, image in enumerate(images()):
        image.save(tmp_path / f"{number}.png")
    code = """
import pathlib, numpy, uhd.export
folder = pathlib.Path(sys.argv[1])
given = uhd.export.inputs(sorted(folder.glob("*.png")), folder / "model.json")
numpy.savez(folder / "given.npz", **given)
print(sorted(name for name in sys.modules if name.partition(".")[0] == "torch"))
"""
    done = run_without(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
    with np.load(tmp_path / "given.npz") as given:
        np.testing.assert_allclose(padded(made, given), tokens_of(made, images()), rtol=0, atol=2e-5)
    assert "torch is imported" in run_without("import uhd.encoder", tmp_path).stderr


def test_what_no_graph_is_made_of_is_refused_by_name(tmp_path):
    other = type("OtherViT", (ViT,), {})(vit().config)
    refuses("OtherViT; a graph is made of", described, tiny_encoder(vision=other), error=TypeError)
    for other in (tmp_path, SimpleNamespace(visual=tiny_encoder())):
        refuses("made of a uhd.VisualEncoder, got .*: take a model's model.visual", described, other, error=TypeError)
    refuses("stem of your own", described, tiny_encoder(vision=own_stem()), error=TypeError)
    pool = tiny_encoder(
        PoolProjector(32, 24), slicing=uhd.strategy("llava-1.5").for_vision(image_size=56, patch_size=14)
    )
    refuses("PoolProjector; a graph is made of Perceiver", described, pool, error=TypeError)
    refuses("are bfloat16; a graph has float32 or float16", described, tiny_encoder().bfloat16())
    mixed = tiny_encoder()
    mixed.vision.half()
    refuses("are float16 and float32", described, mixed)
    hooked = tiny_encoder()
    hooked.vision.blocks[0].register_forward_hook(lambda *_: None)
    refuses(r"vision.blocks.0 cannot be exported, it has hooks", described, hooked, error=TypeError)
    own = tiny_encoder(slicing=lambda image_hw: uhd.slicing.find("llava-uhd").plan(image_hw), check_image_size=False)
    refuses("is the function '.*lambda.*' of your own", described, own)
    tiny_encoder().save_pretrained(tmp_path)
    refuses("has no weights", described, uhd.VisualEncoder.describe(tmp_path))
    rule = uhd.strategy("llava-next").for_vision(image_size=56, patch_size=14)
    refuses("largest plan of 'llava-next.*' is not known", described, tiny_encoder(slicing=rule), dynamic=False)


def own_stem():
    plain = vit()
    return type(plain)(plain.config, stem=nn.Linear(3 * 14**2, 32))


def test_a_description_that_is_missing_or_damaged_is_named(tmp_path):
    path = description(tmp_path, tiny_encoder())
    refuses("there is no .*other.json", inputs, IMAGES, tmp_path / "other.json")
    good = json.loads(path.read_text())
    for name, value, words in [
        ("format", 9, "it has format 9"),
        ("patch_size", "x", "patch_size must be a whole number"),
        ("positions", 3, "not the dictionary of a Positions: it is 3"),
        ("keys", {"kind": "x", "size": 3}, "kind must be 'interpolated' or 'sines'"),
        ("slicing", {}, "model.json does not fit or is damaged"),
        ("patch_size", 0, "model.json does not fit.* patch_size must be at least 1"),
        ("positions", {**good["positions"], "mode": "cubic"}, "mode must be 'bicubic', 'bilinear' or 'nearest'"),
    ]:
        path.write_text(json.dumps({**good, name: value}))
        refuses(words, inputs, IMAGES, path)
    path.write_text(json.dumps(good))
    refuses("no views: give at least one image", inputs, [], path)
    refuses("expected a list of images", inputs, IMAGES[0], path, error=TypeError)
    refuses("image 1: .*not an image", inputs, [IMAGES[0], b"nothing"], path)


def test_pillow_makes_the_pixels_whatever_the_encoders_backend():
    fast = tiny_encoder(pixels=PIXELS.replace(backend="fast", draft=True))
    assert described(fast).own_pixels == PIXELS
    text = json.dumps(described(fast).to_dict())
    assert json.dumps(Graph.from_dict(json.loads(text)).to_dict()) == text
