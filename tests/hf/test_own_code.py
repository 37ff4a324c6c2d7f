"""Neither pickled weights nor code that a folder brings, unless asked: whichever way the folder comes in."""

import io
import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import uhd
from tests.tiny import refuses
from uhd.hf import UHDConfig, UHDForConditionalGeneration, UHDProcessor
from uhd.hf.doctor import diagnose
from uhd.nano import load_nano
from uhd.vision import load_vit

RUNS = "raise SystemExit('the code of the folder was run')\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a model with its processor, and one of its language model with the tokenizer."""
    folder, model = tmp_path_factory.mktemp("saved"), load_nano()
    model.save_pretrained(folder / "model")
    model.processor.save_pretrained(folder / "model")
    model.language_model.save_pretrained(folder / "lm")
    model.processor.tokenizer.save_pretrained(folder / "lm")
    return folder


@pytest.fixture
def yes(monkeypatch):
    """Whoever asks is told to go on."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))


def copied(folder, tmp_path, **files):
    """The folder with entries of its JSON files changed, and code beside them."""
    new = tmp_path / folder.name
    shutil.copytree(folder, new)
    (new / "evil.py").write_text(RUNS)
    for name, changes in files.items():
        settings = json.loads((new / f"{name}.json").read_text())
        (new / f"{name}.json").write_text(json.dumps(settings | changes))
    return new


def pickled(folder, tmp_path):
    new = copied(folder, tmp_path)
    model = load_nano()
    torch.save((model if folder.name == "model" else model.language_model).state_dict(), new / "pytorch_model.bin")
    (new / "model.safetensors").unlink()
    return new


@pytest.mark.parametrize("cls", [UHDForConditionalGeneration, AutoModelForImageTextToText])
def test_pickled_weights_are_read_where_that_is_asked(cls, saved, tmp_path):
    folder = pickled(saved / "model", tmp_path)
    for settings in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        refuses(
            "pytorch_model.bin|no file named model.safetensors",
            cls.from_pretrained,
            folder,
            **settings,
            error=(ValueError, OSError),
        )
    refuses(r"pickled weights only .*use_safetensors=False", cls.from_pretrained, folder)
    refuses(r"pickled weights only", cls.from_pretrained, folder.parent, subfolder="model")
    again = cls.from_pretrained(folder, use_safetensors=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load_nano().parameters(), strict=True))


def test_pickled_adapters_are_refused(saved, tmp_path):
    folder = copied(saved / "model", tmp_path)
    torch.save({}, folder / "adapter_model.bin")
    refuses(r"adapter_model\.bin", UHDForConditionalGeneration.from_pretrained, folder)


def test_the_doctor_reads_no_pickled_weights(saved, tmp_path):
    refuses("pickled weights only", diagnose, pickled(saved / "lm", tmp_path))


OWN_TOKENIZER = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
OWN_MODEL = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("load", [UHDProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_a_tokenizer_of_the_folders_own_is_not_run(load, saved, tmp_path):
    folder = copied(saved / "model", tmp_path, tokenizer_config=OWN_TOKENIZER)
    refuses("code that the folder brings, which is not run: pass trust_remote_code=True", load, folder)
    refuses("is not run", lambda: UHDForConditionalGeneration.from_pretrained(folder).processor)
    with pytest.raises(SystemExit, match="was run"):
        load(folder, trust_remote_code=True)


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize(
    "load", [load_vit, lambda folder: uhd.VisualEncoder.from_pretrained(folder, out_dim=8), diagnose]
)
def test_a_model_of_the_folders_own_is_not_run(load, saved, tmp_path):
    refuses("config.json asks for code .* is not run", load, copied(saved / "lm", tmp_path, config=OWN_MODEL))


@pytest.mark.usefixtures("yes")
def test_the_doctor_runs_no_tokenizer_of_the_folders_own(saved, tmp_path):
    refuses("is not run", diagnose, copied(saved / "lm", tmp_path, tokenizer_config=OWN_TOKENIZER))


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("cls", [UHDForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_a_language_model_of_the_folders_own_is_not_run(cls, kind, saved, tmp_path):
    """Kinds that transformers knows, but not as a language model."""
    text = {"model_type": kind, "auto_map": OWN_MODEL["auto_map"]}
    refuses(
        "text_config is a .* expected a language model's",
        cls.from_pretrained,
        copied(saved / "model", tmp_path, config={"text_config": text}),
    )


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_attention_of_the_hub_is_not_fetched_because_a_file_says_so(name):
    for named in ({name: "kernels-community/flash-attn2"}, {name: {"": "a/b"}}, {"inner": {name: "a/b@main:c"}}):
        for config in (named, {"text_config": {"model_type": "llama", **named}}):
            refuses("would be downloaded and run", UHDConfig.from_dict, config)
    whole = UHDConfig().to_dict()
    assert UHDConfig.from_dict({**whole, name: "eager", "id2label": {0: "a/b"}}).text_config.model_type == "llama"
    asked = UHDConfig.from_dict({**whole, "attn_implementation": "a/b"}, attn_implementation="kernels-community/fa2")
    assert asked._attn_implementation == "kernels-community/fa2"
