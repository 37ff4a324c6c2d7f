"""A model's folder that is damaged is refused before it is built, and the message names the file."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.hf.tiny import attach, encoder
from tests.test_readers import changed
from tests.tiny import refuses
from uhd.hf import UHDConfig, UHDForConditionalGeneration

load = UHDForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """In shards, and in one file."""
    folder, model = tmp_path_factory.mktemp("model"), attach(encoder())
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    model.save_pretrained(folder / "one")
    return folder


@pytest.fixture
def torn(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "torn")


def rewrite(file, place, value):
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, value)))


@pytest.mark.parametrize(
    "place, value, words",
    [
        (["image_token_id"], "x", "image_token_id must be a whole number, got 'x'"),
        (["image_token_id"], ..., "missing image_token_id"),
        (["slicing_config"], ..., "missing slicing_config"),
        (["schema_config"], ..., "missing schema_config"),
        (["vision_config"], ..., "missing vision_config"),
        (["vision_config", "eps"], ..., r"missing vision_config\.eps"),
        (["resampler_config", "settings"], ..., r"missing resampler_config\.settings"),
        (["uhd_format"], ..., "missing uhd_format"),
        (["vision_config", "eps"], math.nan, "eps must be a finite number, got nan"),
        (["vision_config", "antialias"], 7, "antialias must be True or False"),
        (["vision_config", "depth"], 10**9, "depth must be at most 512"),
        (["vision_config", "position_grid_hw"], [4, "x"], "position_grid_hw"),
        (["slicing_config", "rounding"], 99, "rounding must be a text"),
        (["schema_config", "around_image"], 3, "around_image must be a list of 2"),
        (["pixel_config", "std"], [1, 1], "std"),
        (["visual_scale"], math.nan, "visual_scale must be a finite number"),
        (["visual_dtype"], "int8", "visual_dtype must be a floating dtype"),
        (["check_image_size"], 7, "check_image_size must be True or False"),
        (["separator_ids"], {",": [None]}, r"separator_ids\[','\]\[0\] must be a whole number"),
        (["separator_ids"], {",": [10**6]}, r"lie in 0\.\.259, got 1000000"),
        (["fill_token_id"], 10**6, r"lie in 0\.\.259"),
        (["packer_config"], {"width": 32}, "missing newline, separator"),
        (["text_config", "num_hidden_layers"], 10**9, "num_hidden_layers is 1000000000, and the weights are"),
        (["text_config", "hidden_size"], 10**6, "hidden_size is 1000000"),
        (["text_config", "vocab_size"], 10**8, "vocab_size is 100000000"),
        (["text_config", "use_cache"], [[]], "use_cache"),
        (["text_config", "hidden_size"], 64, "RuntimeError"),
        (["text_config"], [], "missing text_config.model_type"),
        (["text_config", "model_type"], ..., "missing text_config.model_type"),
    ],
)
def test_a_damaged_config_is_refused(torn, place, value, words):
    rewrite(torn / "one/config.json", place, value)
    refuses(rf"(?s)config\.json.*{words}", load, torn / "one")


def test_the_config_alone_says_so_too(torn):
    rewrite(torn / "one/config.json", ["schema_config", "row"], None)
    for call in (UHDConfig.from_pretrained, AutoConfig.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        refuses(r"config\.json.*row must be a text, got None", call, torn / "one")


def test_files_cut_short_are_named(torn):
    for folder in ("one", "shards"):
        names = [path.name for path in (torn / folder).iterdir() if path.suffix in (".json", ".safetensors")]
        for name in sorted(names):
            data = (torn / folder / name).read_bytes()
            (torn / folder / name).write_bytes(data[: len(data) // 2])
            read = AutoProcessor.from_pretrained if name.startswith(("processor", "tokenizer")) else load
            refuses(name.replace(".", r"\."), read, torn / folder, error=(ValueError, OSError))
            (torn / folder / name).write_bytes(data)
    assert load(torn / "one").processor is not None
    load(torn / "shards")


def test_shards_and_their_index_agree(torn):
    folder = torn / "shards"
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name, file = next(iter(whole["weight_map"].items()))
    (folder / file).rename(folder / "away")
    refuses(rf"is incomplete: tensors are in missing {file}", load, folder, error=FileNotFoundError)
    (folder / "away").rename(folder / file)
    for map_, words in (
        ({**whole["weight_map"], "more": file}, f"{file} does not hold more, as model.safetensors.index.json says"),
        ({**whole["weight_map"], name: "../x"}, r"index.json must name files beside it, got '../x'"),
        ([], "index.json has no weight_map"),
    ):
        index.write_text(json.dumps({**whole, "weight_map": map_}))
        refuses(words, load, folder)
    for one in ("visual.vision.norm.bias", "visual.vision.stem.weight"):
        index.write_text(
            json.dumps({**whole, "weight_map": {n: f for n, f in whole["weight_map"].items() if n != one}})
        )
        refuses(f"index.json .*there is no {one}", load, folder)


def test_a_vision_side_of_no_numbers_is_refused(torn):
    file = torn / "one/model.safetensors"
    weights = load_file(file)
    weights["visual.vision.stem.weight"].view(-1)[5] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    refuses(r"model\.safetensors .*visual.vision.stem.weight holds NaN", load, torn / "one")


@pytest.mark.parametrize(
    "name, place, value, words",
    [
        ("processor_config.json", ["image_processor", "slicing"], ..., "its image_processor has no slicing"),
        ("processor_config.json", ["image_processor", "slicing"], 0.5, "a strategy is"),
        ("processor_config.json", ["image_processor", "image_mean"], ..., "its image_processor has no image_mean"),
        ("processor_config.json", ["image_processor", "image_mean"], [math.nan] * 3, "mean"),
        ("processor_config.json", ["image_processor", "max_pixels"], "x", "max_pixels"),
        ("processor_config.json", ["video_processor", "slicing", "merge"], ..., "missing merge"),
        ("processor_config.json", ["image_token"], "<other>", "<other>"),
        ("tokenizer_config.json", ["pad_token"], [1], "tokenizer"),
        ("tokenizer.json", ["model"], {}, "did not match"),
    ],
)
def test_a_damaged_processor_is_refused(torn, name, place, value, words):
    rewrite(torn / "one" / name, place, value)
    refuses(rf"(?s){name}.*{words}", AutoProcessor.from_pretrained, torn / "one")


def test_a_shape_that_does_not_fit_is_a_runtime_error_too(torn):
    """As in transformers, where code waits for it."""
    rewrite(torn / "one/config.json", ["text_config", "intermediate_size"], 64)
    refuses("ignore_mismatched_sizes", load, torn / "one", error=RuntimeError)
    found = load(torn / "one", ignore_mismatched_sizes=True)
    assert found.config.text_config.intermediate_size == 64
    assert isinstance(found.visual.vision.norm.bias, torch.Tensor)


@pytest.mark.parametrize("read", [load, UHDConfig.from_pretrained])
def test_a_folder_without_its_description_is_named(read, saved, torn):
    (torn / "one" / "config.json").unlink()
    for path, where in ((torn / "one", {}), (torn, {"subfolder": "one"})):
        words = f"{re.escape(str(torn / 'one'))} has no config.json: copy the whole release"
        refuses(words, read, path, error=FileNotFoundError, **where)
    found = UHDConfig.from_pretrained(saved / "one" / "config.json")
    assert found.vision_config.to_dict() == UHDConfig.from_pretrained(saved, subfolder="one").vision_config.to_dict()
