"""The transformers-native face: importing it registers config, model and processors with the Auto classes."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from uhd.hf.collating import PackedStream, PackingCollator
from uhd.hf.configuration import UHDConfig, UHDResamplerConfig, UHDVisionConfig
from uhd.hf.features import UHDPreTrainedModel
from uhd.hf.image_processing import UHDImageProcessor, UHDImageProcessorPil
from uhd.hf.injection import choose_injection, explain_injection, inject
from uhd.hf.labels import labels_of
from uhd.hf.modeling import UHDForConditionalGeneration, UHDModel
from uhd.hf.processing import UHDProcessor
from uhd.hf.versions import name_for_servers
from uhd.hf.video_processing import UHDVideoProcessor
from uhd.hf.visual_inputs import together

__all__ = [
    "PackedStream",
    "PackingCollator",
    "UHDConfig",
    "UHDForConditionalGeneration",
    "UHDImageProcessor",
    "UHDImageProcessorPil",
    "UHDModel",
    "UHDPreTrainedModel",
    "UHDProcessor",
    "UHDResamplerConfig",
    "UHDVideoProcessor",
    "UHDVisionConfig",
    "choose_injection",
    "explain_injection",
    "inject",
    "labels_of",
    "together",
]

for _config in (UHDConfig, UHDVisionConfig, UHDResamplerConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(UHDConfig, UHDModel, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(UHDConfig, UHDForConditionalGeneration, exist_ok=True)
name_for_servers(UHDConfig.model_type, UHDForConditionalGeneration.__name__)
AutoProcessor.register(UHDConfig, UHDProcessor, exist_ok=True)
# without torchvision transformers has no usable Auto class for videos, nor in older releases for images; ours need no
# torchvision, and are then found by their names
try:
    AutoImageProcessor.register(
        UHDConfig,
        image_processor_classes={"torchvision": UHDImageProcessor, "pil": UHDImageProcessorPil},
        exist_ok=True,
    )
except ImportError:
    UHDProcessor.load_by_name("image_processor", UHDImageProcessor)
try:
    AutoVideoProcessor.register(UHDConfig, UHDVideoProcessor, exist_ok=True)
except ImportError:
    UHDProcessor.load_by_name("video_processor", UHDVideoProcessor)
