"""What is read from disk, and what a folder that cannot be loaded is told."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import uhd
from tests.pretrained import released
from tests.pretrained.released import assert_equal_files, assert_same, change_json, refused
from tests.tiny import picture
from uhd import checkpoint

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LLaVA-NeXT, with every kind of tensor; do not change it."""
    return released.save(*released.make("llava_next"), tmp_path_factory.mktemp("next"))


@pytest.fixture
def own(folder, tmp_path):
    """A copy of it to change, and its tensors."""
    shutil.copytree(folder, tmp_path / "own")
    return tmp_path / "own", load_file(tmp_path / "own" / "model.safetensors")


def is_visual(name):
    return not name.startswith(("language_model.", "lm_head", "model.language_model."))


def shard(folder, tensors):
    """Vision, projector and language model in a file each."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        number = 1 if name.startswith("vision_tower.") else 2 if is_visual(name) else 3
        weight_map[name] = f"model-{number:05}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({name: x for name, x in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def move_newline(folder, file):
    """Let the index say that the newline is in another file."""
    index = folder / "model.safetensors.index.json"
    change_json(index, weight_map={**json.loads(index.read_text())["weight_map"], "image_newline": file})


class Recording:
    """A file of safetensors that counts the bytes it hands out, and those of its mapping that are in memory."""

    def __init__(self, log, path, **how):
        self.log, self.path, self.file = log, Path(path), safe_open(path, **how)

    def __enter__(self):
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *problem):
        maps = Path("/proc/self/smaps").read_text().split("VmFlags")
        self.log["resident"] += sum(
            1024 * int(re.search(r"Rss: +(\d+) kB", part)[1]) for part in maps if str(self.path) in part
        )
        return self.file.__exit__(*problem)

    def keys(self):
        return self.opened.keys()

    def get_tensor(self, name):
        tensor = self.opened.get_tensor(name)
        self.log["bytes"] += tensor.nbytes
        self.log["names"].append(name)
        return tensor


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to see what is in memory")
def test_no_byte_of_the_language_model_is_read(own, monkeypatch):
    """One file, its language model 64 MiB: neither asked for, nor mapped into memory by the way."""
    path, tensors = own
    tensors["language_model.model.embed_tokens.weight"] = torch.zeros(16 * MIB)
    save_file(tensors, path / "model.safetensors")
    size = (path / "model.safetensors").stat().st_size
    log = {"bytes": 0, "resident": 0, "names": []}
    monkeypatch.setattr(checkpoint, "safe_open", lambda file, **how: Recording(log, file, **how))
    encoder = uhd.pretrained.load(path)
    assert log["names"]
    assert all(map(is_visual, log["names"]))
    assert len(set(log["names"])) == len(log["names"])
    # all that is read becomes the encoder; positions of the last block and the final norm are not even read
    assert log["bytes"] == sum(x.nbytes for x in encoder.state_dict().values())
    assert log["bytes"] < log["resident"] + 1
    assert log["resident"] < log["bytes"] + 4 * MIB < size / 10


def test_a_shard_of_the_language_model_may_be_absent(own, folder):
    path, tensors = own
    shard(path, tensors)
    (path / "model-00003-of-00003.safetensors").unlink()
    assert_same(uhd.pretrained.load(path), uhd.pretrained.load(folder))
    (path / "model-00002-of-00003.safetensors").unlink()
    (path / "model-00001-of-00003.safetensors").unlink()
    told = refused(path, r"incomplete.*model-00001-of-00003.*model-00002-of-00003", FileNotFoundError)
    assert "00003-of" not in told


@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_of_a_whole_checkpoint(own, sharded, tmp_path):
    """Every tensor and file; after training, what changed and nothing else, and transformers reads it."""
    path, tensors = own
    if sharded:
        shard(path, tensors)
    encoder = uhd.pretrained.load(path)
    uhd.pretrained.save(encoder, tmp_path / "same", like=path)
    assert_equal_files(path, tmp_path / "same")
    assert {file.name for file in path.iterdir()} == {file.name for file in (tmp_path / "same").iterdir()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    uhd.pretrained.save(encoder, tmp_path / "trained", like=path)
    assert_same(encoder, uhd.pretrained.load(tmp_path / "trained"))
    first, second = (checkpoint.Checkpoint(folder) for folder in (path, tmp_path / "trained"))
    changed = dict(second.read(second.files))
    kept = {name for name, x in first.read(first.files) if torch.equal(x, changed[name])}
    beyond = {name for name in tensors if "encoder.layers.2." in name or "post_layernorm" in name}
    assert kept == {name for name in tensors if not is_visual(name)} | beyond
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    assert torch.equal(model.model.image_newline, encoder.packer.newline)


def test_the_visual_side_alone(own, tmp_path):
    path, tensors = own
    uhd.pretrained.save(uhd.pretrained.load(path), tmp_path / "eyes", like=path, visual_only=True)
    found = load_file(tmp_path / "eyes" / "model.safetensors")
    assert set(found) == set(filter(is_visual, tensors))
    assert uhd.pretrained.load(tmp_path / "eyes").slicing == uhd.pretrained.load(path).slicing


def test_files_may_be_overwritten_while_the_encoder_lives(own):
    """Its tensors are its own, no window into the file."""
    path, _ = own
    encoder = uhd.pretrained.load(path)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-(2**14), 2)
        file.write(b"\xff" * 2**14)
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_files_are_read_only_if_asked(own, folder, sharded, tmp_path):
    path, tensors = own
    (path / "model.safetensors").unlink()
    if sharded:
        files = {name: f"pytorch_model-0000{1 + ('vision' in name)}-of-00002.bin" for name in tensors}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        files = dict.fromkeys(tensors, "pytorch_model.bin")
    for file in set(files.values()):
        torch.save({name: x for name, x in tensors.items() if files[name] == file}, path / file)
    refused(path, "pickled weights only.*pickled=True.*weights_only")
    encoder = uhd.pretrained.load(path, pickled=True)
    assert_same(encoder, uhd.pretrained.load(folder))
    uhd.pretrained.save(encoder, tmp_path / "safe", like=path, pickled=True)
    assert_equal_files(folder, tmp_path / "safe")


def test_a_pickle_runs_no_code(own, tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "was here"), "w")

    path, tensors = own
    (path / "model.safetensors").unlink()
    torch.save({**tensors, "x": Harmful()}, path / "pytorch_model.bin")
    refused(path, "pytorch_model.bin is damaged or holds more than tensors", pickled=True)
    assert not (tmp_path / "was here").exists()


def test_old_names_are_read(own, folder):
    """As releases before transformers 5 have them, or as the modules are called now."""
    path, tensors = own
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()} | {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]
    }
    newer = {f"model.{name}": x for name, x in tensors.items() if is_visual(name)}
    newer |= {"model.language_model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(3)}
    for state in (older, newer):
        save_file(state, path / "model.safetensors")
        assert_same(uhd.pretrained.load(path), uhd.pretrained.load(folder))


def test_names_that_are_missing_or_left_over_are_listed(own):
    path, tensors = own

    def told(change, match):
        state = dict(tensors)
        change(state)
        save_file(state, path / "model.safetensors")
        refused(path, match)

    one, two = torch.ones(2), torch.ones(2)
    told(lambda s: s.update({"adapter.a": one, "adapter.b": two}), r"Left over: adapter.a, adapter.b$")
    newer = {f"model.{key}": value.clone() for key, value in tensors.items() if key.startswith("image_newline")}
    told(lambda s: s.update(newer), r"names of two versions: image_newline, model.image_newline$")
    told(lambda s: s.update({"image_newline.x": one}), r"Left over: image_newline.x$")
    told(lambda s: s.update({"vision_tower.extra.weight": one}), r"Left over: extra.weight")
    told(lambda s: s.pop("vision_tower.pre_layrnorm.bias"), r"Missing: pre_layrnorm.bias. Left over: none")
    told(lambda s: s.pop("multi_modal_projector.linear_2.weight"), r"a projector. Missing: linear_2.weight$")
    told(lambda s: s.pop("multi_modal_projector.linear_1.bias"), r"unexpected \['mlp.2.bias'\]")
    told(lambda s: s.update({"multi_modal_projector.linear_3.bias": one}), r"unexpected \['linear_3.bias'\]")
    told(
        lambda s: [s.pop(key) for key in tensors if "projector" in key], r"no compressor: .* multi_modal_projector. or"
    )
    told(lambda s: s.update({"image_newline": torch.ones(5)}), r"image_newline has the shape \(5,\), expected \(32,\)")
    told(lambda s: s.pop("image_newline"), r"llava_next model has an image_newline, found None")
    name = "vision_tower.pre_layrnorm.bias"
    told(lambda s: s.update({name: torch.ones(7)}), r"asks for \(24,\) in all, the weights have \(7,\)")


@pytest.mark.parametrize("damage", ["old half", "half", "empty", "text", "list", "nested", "number"])
def test_pickled_files_of_other_content_are_named(own, damage):
    path, tensors = own
    (path / "model.safetensors").unlink()
    file = path / "pytorch_model.bin"
    content = {"list": [1], "nested": {"state_dict": tensors}, "number": {**tensors, "epoch": 3}}.get(damage, tensors)
    torch.save(content, file, _use_new_zipfile_serialization=damage != "old half")
    if damage in ("old half", "half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if damage in ("empty", "text"):
        file.write_bytes(b"a text" * (damage == "text"))
    more = {"list": "holds a list, expected a dict", "nested": r"\(state_dict\).*alone", "number": r"\(epoch\)"}
    refused(path, rf"pytorch_model.bin.*{more.get(damage, 'is damaged')}", pickled=True)


@pytest.mark.parametrize("other", [3, "../weights.safetensors", "/weights.safetensors"])
def test_an_index_names_files_of_its_folder(own, other):
    path, tensors = own
    shard(path, tensors)
    (path.parent / "weights.safetensors").write_bytes((path / "model-00002-of-00003.safetensors").read_bytes())
    move_newline(path, other)
    refused(path, r"index.json must name files beside it, got ")


def test_what_is_missing_in_a_folder_is_named(own, tmp_path):
    path, _ = own
    refused("llava-hf/llava-v1.6", "is not a folder; give a local one, nothing is downloaded", FileNotFoundError)
    refused(tmp_path, "has no config.json", FileNotFoundError)
    (path / "preprocessor_config.json").rename(tmp_path / "aside.json")
    refused(path, r"preprocessor_config.json or processor_config.json.*save the", FileNotFoundError)
    nested = {"image_processor": json.loads((tmp_path / "aside.json").read_text()), "processor_class": "x"}
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert uhd.pretrained.load(path).pixels.mean == (0.48145466, 0.4578275, 0.40821073)
    (path / "model.safetensors").unlink()
    refused(path, "has no weights: neither model.safetensors nor", FileNotFoundError)


def test_damaged_files_are_named(own):
    path, tensors = own
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    refused(path, "model.safetensors does not fit or is damaged")
    (path / "model.safetensors").write_bytes(content)
    shard(path, tensors)
    move_newline(path, "model-00001-of-00003.safetensors")
    refused(path, r"model-00001-of-00003.safetensors does not fit .* image_newline")
    (path / "config.json").write_text("{")
    refused(path, r"config.json does not fit or is damaged")


@pytest.mark.parametrize(
    "kind, file, changes, match",
    [
        ("llava_next", "config", {"model_type": "qwen2_vl"}, "type 'qwen2_vl'.*known are llava-uhd-2024"),
        ("llava_next", "config", {"vision_feature_layer": [-2, -3]}, r"joined features of several layers"),
        ("llava_next", "config", {"vision_feature_select_strategy": "full"}, "'full' with .* that has a class"),
        ("llava_onevision", "config", {"vision_feature_select_strategy": "default"}, "'default'.*that has no class"),
        ("llava_next", "config", {"projector_hidden_act": "relu"}, "projector_hidden_act must be one of"),
        ("llava_next", "config", {"image_grid_pinpoints": [[56, 112]]}, "differ: they must be one list"),
        ("llava_onevision", "config", {"vision_aspect_ratio": "anyres"}, "must be anyres_max_N, got 'anyres'"),
        ("llava_next", "preprocessor_config", {"size": {"shortest_edge": 70}}, r"views of \[56, 70\] px, the vision"),
        ("llava_next", "preprocessor_config", {"resample": 0}, "resample must be one of"),
        ("llava_next", "preprocessor_config", {"size": {"longest_edge": 56}}, "must have a shortest_edge, or height"),
        ("llava_next", "preprocessor_config", {"rescale_factor": 1.0}, "rescaled by 1.0 here"),
        ("llava", "config", {"vision_feature_select_strategy": "cls"}, "expected one of .'default', 'full'"),
        ("llava", "preprocessor_config", {"do_resize": False}, "takes squares of 56 px"),
        ("llava", "preprocessor_config", {"do_center_crop": False}, "neither pads nor crops"),
        ("minicpmv4_6", "config", {"merge_kernel_size": [4, 4]}, r"windows of 2 x 2; got '16x' and \[\[4, 4\]"),
        ("minicpmv4_6", "preprocessor_config", {"max_slice_nums": None}, "have no max_slice_nums"),
    ],
)  # fmt: skip
def test_settings_without_a_counterpart_are_refused(kind, file, changes, match, tmp_path):
    path = released.save(*released.make(kind), tmp_path)
    change_json(path / f"{file}.json", **changes)
    assert str(path) in refused(path, match)


def test_options_of_other_families_are_refused(folder):
    refused(folder, "downsample is a mode of minicpm-v-4.6, this is llava-next", downsample="4x")
    refused(folder, "vision_tower is for llava-uhd.*this is llava-next", vision_tower=folder)
    refused(folder, "config.json is that of a llava_next model, not of llava_onevision", family="llava-onevision")
    refused(folder, "family must be one of llava-uhd-2024-03", family="llava")


def test_what_cannot_be_written_is_refused(folder, tmp_path):
    encoder = uhd.pretrained.load(folder)
    with pytest.raises(ValueError, match="write to another one"):
        uhd.pretrained.save(encoder, folder, like=folder)
    with pytest.raises(TypeError, match="expected a VisualEncoder, got a MLPProjector"):
        uhd.pretrained.save(encoder.compressor, tmp_path / "new", like=folder)
    parts = {"slicing": encoder.slicing, "packer": encoder.packer, "pixels": encoder.pixels}
    other = uhd.VisualEncoder(
        encoder.vision, encoder.compressor, **{**parts, "slicing": encoder.slicing.replace(max_tiles=2)}
    )
    with pytest.raises(ValueError, match="slicing is not what the format's settings say, so it would be lost"):
        uhd.pretrained.save(other, tmp_path / "new", like=folder)
    narrow = uhd.resampler.MLPProjector(24, 32, hidden_dim=16)
    changed = uhd.VisualEncoder(encoder.vision, narrow, **parts)
    with pytest.raises(ValueError, match=r"other shapes.*linear_1.weight': \(\(16, 24\), \(32, 24\)\)"):
        uhd.pretrained.save(changed, tmp_path / "new", like=folder)
    encoder.vision = uhd.vision.compress_vit(encoder.vision, 1)
    with pytest.raises(ValueError, match="vision encoder has other settings"):
        uhd.pretrained.save(encoder, tmp_path / "new", like=folder)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sharded_first", [False, True])
def test_weights_of_an_earlier_save_are_not_left_beside_new_ones(own, folder, sharded_first, tmp_path):
    """One file is read in preference to shards: the old one would be loaded without a word."""
    path, tensors = own
    shard(path, tensors)
    encoder = uhd.pretrained.load(path)
    first, second = (path, folder) if sharded_first else (folder, path)
    uhd.pretrained.save(encoder, tmp_path / "new", like=first)
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    with pytest.raises(ValueError, match=r"new holds other weights, model.*: write to a new folder"):
        uhd.pretrained.save(encoder, tmp_path / "new", like=second)
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before
    uhd.pretrained.save(encoder, tmp_path / "new", like=first)  # the same files may be replaced
    assert_equal_files(first, tmp_path / "new")


def test_dtypes(folder, own):
    path, tensors = own
    save_file({name: x.bfloat16() for name, x in tensors.items()}, path / "model.safetensors")
    assert {x.dtype for x in uhd.pretrained.load(path).state_dict().values()} == {torch.bfloat16}
    assert {x.dtype for x in uhd.pretrained.load(folder, dtype=torch.float64).parameters()} == {torch.float64}
    for dtype in ("float16", torch.int8):
        refused(folder, r"dtype must be a floating torch.dtype, such as .*; got ", TypeError, dtype=dtype)


def test_a_part_in_several_dtypes_gets_the_one_that_holds_all(own, folder):
    """As releases have it whose norms were kept in float32; before, the first image failed."""
    path, tensors = own
    norms = {name for name in tensors if "norm" in name}
    save_file({name: x if name in norms else x.bfloat16() for name, x in tensors.items()}, path / "model.safetensors")
    encoder, expected = uhd.pretrained.load(path), uhd.pretrained.load(folder)
    assert {x.dtype for x in encoder.vision.parameters()} == {torch.float32}
    assert {x.dtype for x in encoder.compressor.parameters()} == {torch.bfloat16}
    assert torch.equal(encoder.vision.blocks[0].norm1.weight, expected.vision.blocks[0].norm1.weight)
    with torch.no_grad():
        tokens, near = (part([picture(60, 120)])[0].tokens for part in (encoder, expected))
    assert (tokens.float() - near).abs().mean() < 0.05 * near.abs().mean()


def test_quantised_tensors_are_refused(own):
    path, tensors = own
    name = "multi_modal_projector.linear_1.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path / "model.safetensors")
    refused(path, f"own: quantised tensors.*{name} hold integers")


def test_a_device_that_is_not_there_is_no_damage(folder):
    refused(folder, "maia", RuntimeError, device="maia")


def test_the_module_loads_on_first_use():
    code = "import sys, uhd; print('uhd.pretrained' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.stdout == "False False\n", found.stderr
    assert "pretrained" in dir(uhd)
