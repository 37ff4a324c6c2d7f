"""Language models whose weights torchao, bitsandbytes or quanto keep in few bits: extra ``quantized``."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, QuantoConfig, TorchAoConfig

from tests.hf.tiny import IMAGES, attach, encoder, language_model
from uhd.hf import UHDForConditionalGeneration

pytestmark = [pytest.mark.quantized, pytest.mark.filterwarnings("default")]

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


SETTINGS = {
    "torchao": torchao,
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "optimum.quanto": lambda: QuantoConfig(weights="int8"),
}


def settings(library):
    pytest.importorskip(library)
    return SETTINGS[library]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model alone, and with eyes."""
    folder = tmp_path_factory.mktemp("plain")
    lm = language_model("llama", **WIDE)
    lm.save_pretrained(folder / "lm")
    attach(encoder(64), lm).save_pretrained(folder / "eyes")
    return folder


def converted(model):
    """Names of the linear layers whose weights are kept otherwise."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name
        for name, layer in layers.items()
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter
    }


@pytest.mark.parametrize("library", SETTINGS)
def test_a_quantized_language_model_is_attached_and_saved(library, folders, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(
        folders / "lm", quantization_config=settings(library), dtype=torch.float32
    )
    names = {f"language_model.{name}" for name in converted(lm)}
    model = attach(encoder(64), lm)
    assert converted(model) == names
    assert "language_model.model.layers.1.mlp.up_proj" in names
    batch = model.processor(text="a<image>b", images=IMAGES[0])
    logits = model(**batch).logits
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 1
    if library == "optimum.quanto":
        with pytest.raises(ValueError, match="not serializable"):
            lm.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"with quanto, .* save the vision side with model\.visual"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = UHDForConditionalGeneration.from_pretrained(tmp_path)
    assert converted(again) == names
    assert again(**batch).logits.equal(logits)
    assert {parameter.dtype for parameter in again.visual.parameters()} == {torch.float32}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("library", [*SETTINGS, "4 bits", "a dictionary"])
def test_a_whole_model_spares_the_stem_and_the_compressor_unless_asked(library, asked, folders, tmp_path):
    if library in ("4 bits", "a dictionary"):
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_4bit=True)
    else:
        config = settings(library)
    field = "llm_int8_skip_modules" if isinstance(config, BitsAndBytesConfig) else "modules_to_not_convert"
    if asked:
        setattr(config, field, ["language_model.lm_head"])
    model = UHDForConditionalGeneration.from_pretrained(
        folders / "eyes",
        quantization_config=config.to_dict() if library == "a dictionary" else config,
        dtype=torch.float32,
    )
    assert getattr(config, field) == (["language_model.lm_head"] if asked else None)
    names = converted(model)
    assert {"language_model.model.layers.1.mlp.up_proj", "visual.vision.blocks.0.mlp.fc1"} <= names
    assert "language_model.lm_head" not in names
    spared = {"visual.vision.stem", "visual.compressor.kv_proj"}
    assert names & spared == (spared if asked else set())
    if not asked and library != "optimum.quanto":
        batch = model.processor(text="a<image>b", images=IMAGES[0])
        model.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        assert converted(again) == names
        assert again(**batch).logits.equal(model(**batch).logits)


def test_a_quantization_that_cannot_spare_the_eyes_is_refused_at_saving(tmp_path):
    """GPTQ's config names what it converts by block, not what it leaves alone."""
    lm = language_model("llama")
    lm.hf_quantizer = SimpleNamespace(quantization_config=GPTQConfig(bits=4), is_serializable=lambda: True)
    model = attach(encoder(), lm)
    with pytest.raises(ValueError, match="quantized with gptq, which cannot be saved with eyes"):
        model.save_pretrained(tmp_path)
