"""Parts of the user's own that have a name: saved, loaded, trained from a checkpoint, and refused before that."""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest
import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import uhd
from tests.hf.test_trainer import goes_on_exactly, trainer
from tests.hf.tiny import IMAGES, TEXTS, WIDTH, attach, encoder, language_model
from tests.tiny import assert_same_images, perceiver, refuses, stirred, tiny_encoder, vit
from uhd.hf import UHDForConditionalGeneration, training
from uhd.resampler import MLPProjector
from uhd.slicing import SlicingConfig, find
from uhd.slicing.strategies import StrategyConfig
from uhd.slicing.strategies.fixed import StretchConfig
from uhd.vision import VisionTower, ViT

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Louder(ViT):
    """A subclass of ours, built of its config alone."""

    def forward(self, patches, grids, **how):
        return 1.5 * super().forward(patches, grids, **how)


TOWER = {"patch_size": 32, "out_dim": 16}


class ConvNeXt(VisionTower):
    """timm's, with a table that its constructor computes and no file holds, as many backbones have."""

    def __init__(self, name, dims):
        model = timm.create_model(name, dims=dims, depths=(1, 1, 1, 1), num_classes=0)
        super().__init__(model, patch_size=32, out_dim=dims[-1])
        self.name, self.dims = name, dims
        self.register_buffer("table", torch.arange(1.0, 4.0) / 3, persistent=False)

    def forward(self, patches, grids):
        return super().forward(patches, grids) * self.table.sum()


class Scaled(MLPProjector):
    """A subclass with arguments of its own, which its base's ``to_dict`` finds as attributes."""

    def __init__(self, in_dim, out_dim, *, factor):
        super().__init__(in_dim, out_dim)
        self.factor = factor

    def compress(self, features, grids):
        return self.factor * super().compress(features, grids)


def stretched(image_hw):
    """The whole image in a square."""
    found = find("llava-1.5").for_vision(image_size=56, patch_size=14).plan(image_hw)
    return replace(found, strategy="stretched")


def registered():
    uhd.register_vision("louder", Louder)
    uhd.register_vision("conv-next", ConvNeXt)
    uhd.register_compressor("scaled", Scaled)
    uhd.register_strategy("stretched", stretched)


def own_encoder(kind):
    torch.manual_seed(0)
    if kind == "convnext":
        slicing = SlicingConfig(image_size=64, patch_size=32, max_slices=4)
        tower = ConvNeXt("convnext_atto", (8, 8, 16, 16))
        return tiny_encoder(Scaled(16, WIDTH, factor=3), vision=tower, slicing=slicing)
    return tiny_encoder(Scaled(32, WIDTH, factor=3), vision=Louder(vit().config), slicing="stretched")


KINDS = pytest.mark.parametrize("kind", ["convnext", "subclass and function"])


@KINDS
def test_they_are_saved_and_loaded(kind, tmp_path):
    registered()
    eyes = stirred(own_encoder(kind))
    eyes.save_pretrained(tmp_path / "encoder")
    again = uhd.VisualEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert_same_images(again(IMAGES), eyes(IMAGES))
    found = attach(eyes, language_model("llama", max_position_embeddings=1024))
    found.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(loaded.visual.vision) is type(eyes.vision)
    assert loaded.config.vision_config.patch_size == eyes.vision.patch_size
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    batch = processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, found(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").encoder == found.config.encoder


def test_tables_keep_their_precision_where_the_model_is_loaded_in_another(tmp_path):
    registered()
    found = attach(own_encoder("convnext"), language_model("llama", max_position_embeddings=1024))
    found.save_pretrained(tmp_path)
    half = UHDForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.visual.vision.table, found.visual.vision.table.bfloat16())


@KINDS
def test_trainer_goes_on_from_a_checkpoint_with_them(kind, tmp_path):
    registered()

    def make(folder):
        torch.manual_seed(0)
        found = attach(own_encoder(kind), language_model("llama", max_position_embeddings=1024))
        optimizer = torch.optim.AdamW(training.tune_all(found, lr=1e-2, vision_lr=1e-3))
        return trainer(found, folder, optimizers=(optimizer, None))

    _, loaded = goes_on_exactly(make, tmp_path)
    assert type(loaded.visual.vision) is {"convnext": ConvNeXt, "subclass and function": Louder}[kind]


LOAD = """
import sys
import uhd, uhd.hf
from transformers import AutoModelForImageTextToText, AutoProcessor
for load, folder in (
    (uhd.VisualEncoder.from_pretrained, "encoder"),
    (AutoModelForImageTextToText.from_pretrained, "model"),
    (AutoProcessor.from_pretrained, "model"),
):
    try:
        load(f"{sys.argv[1]}/{folder}")
        print("loaded")
    except ValueError as problem:
        print(problem)
"""


def test_a_process_that_has_not_registered_them_says_what_to_register(tmp_path):
    registered()
    eyes = own_encoder("subclass and function")
    eyes.save_pretrained(tmp_path / "encoder")
    attach(eyes, language_model("llama")).save_pretrained(tmp_path / "model")
    arguments = [sys.executable, "-c", LOAD, str(tmp_path)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    part = "saved with the vision 'louder', which is not registered here: import what calls "
    part += "uhd.register_vision('louder', Louder) before loading"
    assert said[0].endswith(part)
    assert said[1].endswith(f"model.safetensors): {part}")
    rule = "it was saved with the strategy 'stretched', which is not registered here: call "
    assert rule + "uhd.register_strategy('stretched', your function) before loading" in said[2]
    assert len(said) == 3


class Grown(MLPProjector):
    """Has more weights than its arguments say."""

    def grow(self):
        self.more = nn.Parameter(torch.ones(3))
        return self


class Unwritable(Scaled):
    pass


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: Scaled(32, WIDTH, factor=2), r"is a Scaled, which uhd cannot build again: register .*register_comp"),
        (
            lambda: uhd.register_compressor("u", Unwritable)(32, WIDTH, factor=torch.ones(1)),
            "Unwritable cannot be saved",
        ),
        (lambda: uhd.register_compressor("g", Grown)(32, WIDTH).grow(), "build another one, with other weights more"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_attach(part, words):
    refuses(words, attach, tiny_encoder(part(), slicing=SlicingConfig(image_size=56, tokens_per_view=None)))


def test_towers_and_tied_weights_are_refused_at_attach():
    tower = VisionTower(timm.create_model("convnext_atto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)), **TOWER)
    slicing = SlicingConfig(image_size=64, patch_size=32, tokens_per_view=None)
    eyes = tiny_encoder(MLPProjector(16, WIDTH), vision=tower, slicing=slicing)
    refuses("make a subclass whose constructor builds", attach, eyes)
    tied = encoder()
    tied.vision.blocks[1].mlp.fc1.weight = tied.vision.blocks[0].mlp.fc1.weight
    refuses(r"blocks.0.mlp.fc1.weight and vision.blocks.1.mlp.fc1.weight are one, untie them first", attach, tied)


def test_arguments_that_are_not_kept_are_named(tmp_path):
    @partial(uhd.register_compressor, "keeps-nothing")
    class KeepsNothing(nn.Module):
        tokens_per_view, out_dim = 1, WIDTH

        def __init__(self, gain):
            super().__init__()
            self.linear = nn.Linear(32, WIDTH)

        def forward(self, features, grids):
            views = features.split([h * w for h, w in grids])
            return self.linear(torch.stack([view.mean(0) for view in views]))[:, None]

    eyes = tiny_encoder(KeepsNothing(2))
    refuses("does not keep gain of its constructor's arguments as attributes", attach, eyes)
    refuses("does not keep gain", eyes.save_pretrained, tmp_path / "never_written")

    @partial(uhd.register_compressor, "passes-them-on")
    class PassesThemOn(MLPProjector):
        def __init__(self, *sizes):
            super().__init__(*sizes)

    eyes = tiny_encoder(PassesThemOn(32, WIDTH))
    refuses("does not keep sizes of its constructor's arguments", eyes.save_pretrained, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_that_are_taken_and_what_is_no_part():
    registered()
    registered()  # the same once more is no conflict
    words = "the vision name 'louder' is taken by .*Louder: choose another for .*ConvNeXt"
    refuses(words, uhd.register_vision, "louder", ConvNeXt)
    refuses("the compressor name 'perceiver' is taken by uhd", uhd.register_compressor, "perceiver", Scaled)
    refuses("the vision name 'custom' is taken", uhd.register_vision, "custom", Louder)
    refuses("Louder is registered as the vision 'louder' already", uhd.register_vision, "other", Louder)
    refuses("a class of torch.nn.Module, got <function", uhd.register_vision, "f", stretched, error=TypeError)
    refuses("under a name, a str, got type", uhd.register_vision, Louder, Louder, error=TypeError)
    refuses("under a name, a str, got type", uhd.register_vision, Louder, error=TypeError)
    refuses("under a name, a str, got function", uhd.register_strategy, stretched, error=TypeError)
    refuses("the strategy name 'InternVL' is taken by InternVLConfig", uhd.register_strategy, "InternVL", stretched)
    refuses("registered as the strategy 'stretched' already", uhd.register_strategy, "other", stretched)
    refuses("a strategy is a function", uhd.register_strategy, "x", 3, error=TypeError)


def test_a_class_defined_again_takes_the_place_of_the_old_one():
    """As a notebook's cell does."""
    cell = "@uhd.register_vision('again')\nclass Again(uhd.vision.ViT):\n    pass\n"
    first, second = {"uhd": uhd, "__name__": "cell"}, {"uhd": uhd, "__name__": "cell"}
    exec(cell, first)
    exec(cell, second)
    eyes = tiny_encoder(perceiver(width=WIDTH), vision=second["Again"](vit().config))
    assert attach(eyes).config.vision_config.kind == "again"


class TestStrategies:
    def test_a_name_stands_for_it_everywhere(self):
        uhd.register_strategy("In_A_Square", stretched)
        assert uhd.plan((30, 50), "in-a-square") == stretched((30, 50)) == uhd.strategy("in_a_square")((30, 50))
        assert uhd.strategies()["in-a-square"] == "The whole image in a square."
        assert find(stretched) == find("in-a-square")  # so that an encoder that was given the function is saved too
        assert uhd.image_costs([(30, 50)], "in-a-square").tolist() == [16]
        refuses("did you mean 'in-a-square'", uhd.plan, (3, 5), "in-a-squre")

    def test_a_method_and_a_partial(self):
        whole = partial(stretched)
        uhd.register_strategy("method", find("blip2").plan)
        uhd.register_strategy("partial", whole)
        assert [find(rule).name for rule in (find("blip2").plan, whole)] == ["method", "partial"]
        assert uhd.strategies()["partial"] == "The whole image in a square."

    def test_the_processor_follows_a_function_that_is_defined_again(self):
        cell = "def rule(image_hw):\n    return make(image_hw)\nuhd.register_strategy('rule', rule)"
        one, two = (find(name).for_vision(image_size=56, patch_size=14) for name in ("llava-1.5", "llava-next"))
        exec(cell, {"uhd": uhd, "make": one.plan, "__name__": "cell"})
        processor = attach(encoder(slicing="rule")).processor.image_processor
        before = processor.plan((100, 60))
        exec(cell, {"uhd": uhd, "make": two.plan, "__name__": "cell"})
        assert processor.plan((100, 60)).num_views > before.num_views == 1

    def test_settings_of_a_class_of_ones_own(self, tmp_path):
        @dataclass(frozen=True)
        class Twice(StretchConfig):
            pass

        rule = Twice("twice", patch_size=14, tile=56, tokens=4)
        eyes = tiny_encoder(slicing=rule)
        eyes.save_pretrained(tmp_path)
        refuses("unknown rule 'Twice'.* need uhd.register_strategy first", uhd.VisualEncoder.from_pretrained, tmp_path)
        uhd.register_strategy("twice", rule)
        assert uhd.VisualEncoder.from_pretrained(tmp_path).slicing == eyes.slicing
        assert issubclass(Twice, StrategyConfig)
