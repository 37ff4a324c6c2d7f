"""transformers' ModelTesterMixin and ConfigTester over Llama, Qwen2, GPT-2, and Gemma 4 (images by hook)."""

import copy
import unittest

import torch
from PIL import Image
from transformers.models.auto import modeling_auto

import uhd
from uhd.hf import UHDConfig, UHDForConditionalGeneration, UHDImageProcessor, UHDModel, UHDVideoProcessor

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor

# what a class of the package would have: the testers look classes up by name
modeling_auto.MODEL_MAPPING_NAMES["uhd"] = "UHDModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["uhd"] = "UHDForConditionalGeneration"

SIDE = 14  # one patch an image, so that what is packed by patches is cut by samples as the testers cut it
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"hidden_size": 32, "intermediate_size": 37}
GEMMA = {"head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 8}
GEMMA |= {"vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0, "sliding_window": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
LANGUAGE_MODELS = {
    "llama": SIZES,
    "qwen2": SIZES,
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma4_text": {**SIZES, **GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
}
VISION = {"patch_size": 14, "image_size": SIDE, "width": 24, "depth": 2, "heads": 2, "mlp_width": 32}
VISION |= {"position_grid_hw": [1, 1], "class_token": False, "position_prefix": 0, "select_layer": -1}
VISION |= {"pre_norm": False, "patch_bias": True, "final_norm": True}
SLICING = uhd.SlicingConfig.preset("llava-uhd-safe").replace(tokens_per_view=4)
SLICING = SLICING.for_vision(image_size=SIDE, patch_size=14).to_dict()


class Tester:
    batch_size, num_hidden_layers, num_attention_heads, hidden_size, is_training = 7, 2, 4, 32, True
    vision_config = {"num_hidden_layers": VISION["depth"]}  # noqa: RUF012

    def __init__(self, kind):
        self.kind = kind
        config = self.get_config()
        pictures = [Image.effect_noise((SIDE, SIDE), 80).convert("RGB") for _ in range(self.batch_size)]
        processor = UHDImageProcessor.from_settings(config.slicing, config.pixels)
        self.images = dict(processor(pictures))
        [self.length] = set(self.images.pop("num_image_tokens").tolist())
        self.videos = dict(UHDVideoProcessor.of(processor)([[picture, picture] for picture in pictures]))
        self.videos.pop("num_video_tokens")
        self.seq_length = self.length + 5

    def get_config(self):
        ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return UHDConfig(
            vision_config=copy.deepcopy(VISION),
            resampler_config={
                "kind": "perceiver",
                "settings": {"width": 32, "vision_width": 24, "num_heads": 4, "num_latents": 4},
            },
            slicing_config=copy.deepcopy(SLICING),
            text_config={"model_type": self.kind, **LANGUAGE_MODELS[self.kind], **ids},
            image_token_id=4,
            video_token_id=3,
            separator_ids={",": [5], "\n": [6]},
            injection_mode="hook" if self.kind == "gemma4_text" else "embeds",
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 90).clamp(min=10)
        ids[:, 1 : 1 + self.length] = 4
        images = {name: value.clone() for name, value in self.images.items()}
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


class Suite(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (UHDModel, UHDForConditionalGeneration)
    additional_model_inputs = ("pixel_values", "grids", "num_patches", "image_sizes", "image_plans")
    _is_composite = True

    def setUp(self):
        self.model_tester = Tester(self.kind)
        self.config_tester = ConfigTester(self, config_class=UHDConfig, has_text_modality=False)

    def _image_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), dict(self.model_tester.images)

    def _video_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), dict(self.model_tester.videos)

    def test_config(self):
        self.config_tester.run_common_tests()


class TestLlama(Suite, unittest.TestCase):
    kind = "llama"


class TestQwen2(Suite, unittest.TestCase):
    kind = "qwen2"


class TestGPT2(Suite, unittest.TestCase):
    kind = "gpt2"


class TestHook(Suite, unittest.TestCase):
    kind = "gemma4_text"
