"""Whatever is wrong with a file written here is refused, by the names of file and field; nothing is guessed."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import uhd
from tests.tiny import picture, refuses, tiny_encoder
from uhd.hf.plans import read_plans, write_plans
from uhd.resampler import FeaturePacker, MergeProjector, MLPProjector, PerceiverConfig, PoolProjector
from uhd.schema import SpatialSchema
from uhd.slicing import SlicePlan, SlicingConfig, plan, plan_video
from uhd.slicing.plan import contradictions
from uhd.slicing.strategies import STRATEGIES
from uhd.token_files import load_tokens, save_tokens
from uhd.vision import ViTConfig

NAN = float("nan")
WIDE_HW = (300, 700)


def changed(data, place, value):
    """A copy of nested settings with another value at a place; ``...`` leaves the key out."""
    data = json.loads(json.dumps(data))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return data


# ---- plans


def test_every_plan_is_read_again():
    for name in (*STRATEGIES, *uhd.slicing.PRESETS):
        for size in ((300, 500), (2000, 900)):
            found = plan(size, name)
            assert list(contradictions(found)) == []
            assert SlicePlan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "place, value, words",
    [
        (["image_hw"], [None, "x"], r"image_hw\[0\] must be a whole number, got None"),
        (["image_hw"], [300.0, 700], r"image_hw\[0\] must be a whole number, got 300.0"),
        (["image_hw"], [300], "image_hw must be a list of 2"),
        (["image_hw"], [0, 700], "got height 0"),
        (["image_hw"], ..., "missing image_hw"),
        (["num_visual_tokens"], 5, "num_visual_tokens is 5"),
        (["num_separators"], -1, "num_separators is -1"),
        (["num_separators"], True, "num_separators must be a whole number, got True"),
        (["grid"], [10**6, 10**6], "grid .* but"),
        (["grid"], None, "no grid"),
        (["strategy"], 3, "strategy must be a text"),
        (["antialias"], 7, "antialias must be True or False, got 7"),
        (["resample"], "box", "resample is 'box'"),
        (["patch_size"], 0, "patch_size is 0"),
        (["canvases"], [], "no view"),
        (["canvases"], {}, "canvases must be a list"),
        (["canvases", 0, "tiles", 0], [0, 0, 9], r"canvases\[0\].*tiles\[0\] must be a list of 4"),
        (["canvases", 0, "tiles", 0, 2], 10**6, "is not on the"),
        (["canvases", 0, "grid"], [1, 10**9], "its tiles are"),
        (["canvases", 0, "view_hw"], [10**9, 10**9], "would not fit in memory"),
        (["canvases", 0, "tokens_per_view"], -1, "tokens_per_view is -1"),
        (["canvases", 0, "kind"], "crop", "kind is 'crop'"),
        (["canvases", 0, "fill"], [0, 0, 700], "no RGB colour"),
        (["canvases", 0, "view_filter"], ["bicubic", 1], r"view_filter\[1\] must be True or False"),
        (["canvases", 0, "offset"], ..., "missing offset"),
        (["shape"], 1, r"SlicePlan has no \['shape'\]"),
    ],
)
def test_a_damaged_plan_is_refused(place, value, words):
    data = changed(plan(WIDE_HW, "llava-uhd").to_dict(), place, value)
    refuses(words, SlicePlan.from_dict, data)


def test_a_packing_that_counts_otherwise_is_refused():
    data = plan(WIDE_HW, "llava-next").to_dict()
    refuses("its packing makes", SlicePlan.from_dict, changed(data, ["num_separators"], 99))
    refuses("its packing makes", SlicePlan.from_dict, changed(data, ["packing", "merge"], 2))
    for name, value in (("merge", 0), ("pooled_hw", [0, 3]), ("separator", "x"), ("kept", [3, 0, 1, 4])):
        refuses(f"packing: .*{name}", SlicePlan.from_dict, changed(data, ["packing", name], value))
    refuses("packing.*newline must be True or False", SlicePlan.from_dict, changed(data, ["packing", "newline"], 1))


def test_plans_of_earlier_versions_are_read():
    data = plan(WIDE_HW, "llava-uhd").to_dict()
    for name in ("packing", "resample", "antialias"):
        del data[name]
    for canvas in data["canvases"]:
        del canvas["cell"], canvas["first_hw"], canvas["view_filter"]
    assert SlicePlan.from_dict(data) == plan(WIDE_HW, "llava-uhd")
    data = plan(WIDE_HW, "ovis2").to_dict()  # a canvas for each slice: they told no place in the grid
    for canvas in data["canvases"]:
        del canvas["cell"]
    read = SlicePlan.from_dict(data)
    assert (read.grid, read.num_views) == (plan(WIDE_HW, "ovis2").grid, plan(WIDE_HW, "ovis2").num_views)


def test_damaged_rows_of_plans_are_refused():
    rows = write_plans([plan(WIDE_HW)])
    rows[0, 20] ^= 3
    refuses("a row of the plans is not one", read_plans, rows)
    refuses("plans is empty", uhd.slicing.VideoPlan.from_dict, {"plans": [], "newline": False})
    refuses("plans must be a list", uhd.slicing.VideoPlan.from_dict, {"plans": {"a": 1}, "newline": False})


# ---- settings


@pytest.mark.parametrize(
    "settings, place, value, words",
    [
        (SlicingConfig(), ["max_tokens"], 1.5, "max_tokens must be a whole number, got 1.5"),
        (SlicingConfig(), ["clamp"], 1, "clamp must be True or False"),
        (SlicingConfig(), ["separators", "per_row"], "x", "separators.*per_row must be a whole number"),
        (SlicingConfig(), ["separators"], None, "separators"),
        (SlicingConfig(), ["merge"], ..., "missing merge"),
        (SpatialSchema(), ["around_image"], ["", 3], r"around_image\[1\] must be a text"),
        (SpatialSchema(), ["learned"], ",", "learned must be a list"),
        (uhd.PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3), ["mean"], [0.5, NAN, 0.5], r"mean\[1\] .* finite number"),
        (uhd.PixelSettings(mean=(0.5,) * 3, std=(0.5,) * 3), ["background"], ..., "missing background"),
    ],
)
def test_damaged_settings_are_refused(settings, place, value, words):
    read = type(settings).from_dict
    assert read(json.loads(json.dumps(settings.to_dict()))) == settings
    refuses(words, read, changed(settings.to_dict(), place, value))


@pytest.mark.parametrize(
    "make, settings, words",
    [
        (ViTConfig, {"eps": NAN}, "eps must be a finite number"),
        (ViTConfig, {"eps": -1e-6}, "eps must be at least 0"),
        (ViTConfig, {"antialias": 7}, "antialias must be True or False"),
        (ViTConfig, {"depth": 10**9}, "depth must be at most 512"),
        (ViTConfig, {"depth": 1e9}, "depth must be a whole number"),
        (ViTConfig, {"num_registers": -1}, "num_registers must be at least 0"),
        (ViTConfig, {"stem_border": -1}, "stem_border must be at least 0"),
        (ViTConfig, {"image_size": 0}, "image_size must be at least 1"),
        (ViTConfig, {"layer_scale": "x"}, "layer_scale must be a finite number"),
        (PerceiverConfig, {"eps": math.inf}, "eps must be a finite number"),
        (PerceiverConfig, {"depth": 10**6}, "depth must be at most 512"),
        (PerceiverConfig, {"num_latents": 10**8}, "numbers a view"),
        (PerceiverConfig, {"query_position": 1}, "query_position must be True or False"),
    ],
)
def test_parts_that_cannot_be_are_refused(make, settings, words):
    sizes = {
        ViTConfig: {"patch_size": 14, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64},
        PerceiverConfig: {"width": 24, "vision_width": 32, "num_heads": 2, "num_latents": 4},
    }[make]
    refuses(words, make, **{**sizes, **settings})


def test_projectors_that_cannot_be_are_refused():
    refuses("rounds must be at most 16", MergeProjector, 4, 4, rounds=10**9)
    refuses("out_dim must be at least 1", MLPProjector, 4, 0)
    refuses("factor must be at least 1", PoolProjector, 4, 4, factor=-1)
    refuses("width must be at most", FeaturePacker, 10**9)


# ---- an encoder's folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_encoder().save_pretrained(folder)
    return folder


@pytest.fixture
def torn(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "torn")


@pytest.mark.parametrize(
    "place, value, words",
    [
        (["vision", "config", "eps"], NAN, "eps must be a finite number, got nan"),
        (["vision", "config", "antialias"], 7, "antialias must be True or False"),
        (["vision", "config", "depth"], 10**9, "depth must be at most 512"),
        (["vision", "config", "eps"], ..., "missing eps"),
        (["vision", "config"], ..., "missing patch_size"),
        (["vision", "kind"], ..., "kind"),
        (["vision", "kind"], ["vit"], "kind must be a text"),
        (["compressor", "config", "num_latents"], "4", "num_latents must be a whole number, got '4'"),
        (["slicing", "patch_size"], None, "patch_size must be a whole number"),
        (["slicing", "rule"], ..., "unknown rule None"),
        (["schema", "column"], ..., "missing column"),
        (["pixels", "max_pixels"], 1e9, "max_pixels must be a whole number"),
        (["pixels", "backend"], "gpu", "backend must be"),
        (["packer"], {"width": 24}, "missing newline, separator"),
        (["check_image_size"], "yes", "check_image_size must be True or False"),
        (["note"], 3, "note must be a text"),
        (["note"], ..., "missing note"),
        (["format"], ..., "format None"),
        (["compressor", "config"], "abc", "config must be an object"),
        (["vision"], [], "vision must be an object"),
    ],
)
def test_a_damaged_description_is_refused(torn, place, value, words):
    file = torn / "uhd_encoder.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, value)))
    refuses(rf"uhd_encoder\.json .*{words}", uhd.VisualEncoder.from_pretrained, torn)


def test_sizes_are_held_against_the_weights_before_anything_is_made(torn):
    """A ViT a million wide would take terabytes."""
    file = torn / "uhd_encoder.json"
    data = json.loads(file.read_text())
    data["vision"]["config"].update(mlp_width=10**6, width=10**6)
    data["compressor"]["config"].update(vision_width=10**6)
    file.write_text(json.dumps(data))
    refuses(r"model\.safetensors .*of other shapes than what uhd_encoder", uhd.VisualEncoder.from_pretrained, torn)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w["vision.stem.weight"].view(-1)[3:4].fill_(NAN), "vision.stem.weight holds NaN or infinity"),
        (lambda w: w["compressor.query"].view(-1)[3:4].fill_(math.inf), "compressor.query holds NaN or infinity"),
        (lambda w: w.update({"vision.norm.bias": w["vision.norm.bias"].half()}), "a part has one dtype"),
        (lambda w: w.pop("vision.norm.bias"), r"missing \['vision.norm.bias'\]"),
        (lambda w: w.update({"vision.norm.bias": torch.zeros(7)}), "other shapes"),
        (lambda w: w.update({"more": torch.zeros(7)}), r"unexpected \['more'\]"),
    ],
)
def test_damaged_weights_are_refused(torn, change, words):
    file = torn / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    refuses(rf"model\.safetensors .*{words}", uhd.VisualEncoder.from_pretrained, torn)


def test_parts_may_have_dtypes_of_their_own(tmp_path):
    encoder = tiny_encoder()
    encoder.vision.half()
    encoder.save_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path)
    assert again.vision.norm.bias.dtype == torch.float16
    assert again.compressor.query.dtype == torch.float32


def test_a_part_of_two_dtypes_is_refused_before_it_is_written(tmp_path):
    encoder = tiny_encoder().half()
    encoder.vision.norm.float()
    refuses("a part has one dtype, convert the encoder and save it again", encoder.save_pretrained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["uhd_encoder.json", "model.safetensors"])
def test_files_cut_short_are_refused(torn, name):
    data = (torn / name).read_bytes()
    for length in (0, 1, 9, len(data) // 2, len(data) - 3):
        (torn / name).write_bytes(data[:length])
        refuses(name.replace(".", r"\."), uhd.VisualEncoder.from_pretrained, torn)


# ---- token files


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "some.safetensors"
    encoder = tiny_encoder()
    save_tokens(file, encoder([picture(70, 40), picture(20, 30)]), schema=encoder.schema, names=["a", "b"])
    return file


def rewritten(tokens, folder, key, place, value):
    with safe_open(tokens, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    texts = metadata | {"images": bytes(tensors["images"].tolist()).decode()}
    data = json.loads(texts[key])
    text = json.dumps(changed(data, place, value) if place else value)
    if key == "images":
        tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    else:
        metadata[key] = text
    save_file(tensors, folder / "torn.safetensors", metadata=metadata)
    return folder / "torn.safetensors"


@pytest.mark.parametrize(
    "key, place, value, words",
    [
        ("images", [0, "plan", "num_separators"], 99, "image 0 is planned by .* with 99 separators"),
        ("images", [0, "plan", "image_hw"], [None, "x"], "image_hw"),
        ("images", [1, "plan"], ..., "missing plan"),
        ("images", [1, "name"], 3, "name must be a text"),
        ("images", [1], [], "_Item"),
        ("images", [1], ..., "it holds .* tokens, its 1 plans count"),
        ("images", [], {}, "it holds .* tokens, its 0 plans"),
        ("schema", ["row"], None, "row must be a text"),
        ("schema", ["around_image"], ["<", ">"], "separators, schema"),
        ("schema", [], [], "SpatialSchema"),
    ],
)
def test_damaged_token_files_are_refused(tokens, tmp_path, key, place, value, words):
    refuses(rf"torn\.safetensors .*{words}", load_tokens, rewritten(tokens, tmp_path, key, place, value))


def test_tokens_of_another_kind_are_refused(tokens, tmp_path):
    with safe_open(tokens, framework="pt") as opened:
        metadata, numbers, images = opened.metadata(), opened.get_tensor("tokens"), opened.get_tensor("images")
    for name, other in (("int", numbers.int()), ("flat", numbers.flatten())):
        save_file({"tokens": other, "images": images}, tmp_path / f"{name}.safetensors", metadata=metadata)
        refuses(rf"{name}\.safetensors .*expected \(n, D\) of floats", load_tokens, tmp_path / f"{name}.safetensors")
    save_file({"other": numbers, "images": images}, tmp_path / "other.safetensors", metadata=metadata)
    refuses(r"other\.safetensors .*tokens", load_tokens, tmp_path / "other.safetensors")


def test_videos_are_read_again_and_their_frames_checked(tmp_path):
    encoder = tiny_encoder()
    videos = encoder.encode_videos([[picture(60, 90), picture(60, 90, 1)]])
    save_tokens(tmp_path / "video.safetensors", videos, schema=encoder.schema)
    (again,) = load_tokens(tmp_path / "video.safetensors")
    assert torch.equal(again.tokens, videos[0].tokens)
    assert again.layout == videos[0].layout
    place = [0, "plan", "plans", 1, "num_separators"]
    file = rewritten(tmp_path / "video.safetensors", tmp_path, "images", place, 99)
    refuses("with 99 separators", load_tokens, file)
    assert plan_video((60, 90), 2).num_frames == 2


# ---- states


def test_damaged_states_of_a_sampler_are_refused():
    sampler = uhd.TokenBudgetSampler([3, 4, 2, 5], 5)
    state = sampler.state_dict()
    for changes, words in (
        ({"before": [[None, "x"]]}, r"before\[0\]\[0\] must be a whole number"),
        ({"before": [[10**9, 1]]}, "1 batches of 1000000000 ranks"),
        ({"before": 7}, "before must be a list"),
        ({"num_replicas": 0}, "batches of 0 ranks"),
        ({"num_replicas": 10**9}, "batches of 1000000000 ranks"),
        ({"batches": -1}, "-1 batches"),
        ({"batches": "1"}, "batches must be a whole number"),
        ({"epoch": NAN}, "epoch must be a whole number"),
        ({"epoch": -1}, "epoch must be"),
    ):
        refuses(words, sampler.load_state_dict, {**state, **changes})
    refuses("a sampler's state is not one", sampler.load_state_dict, [1])
    assert sampler.state_dict() == state
    sampler.load_state_dict(state)
