"""transformers' testers of processors, image processors and video processors over ours."""

import json
import unittest

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import uhd
from uhd.hf import UHDImageProcessor, UHDImageProcessorPil, UHDProcessor, UHDVideoProcessor
from uhd.hf.processing import PLAIN_CHAT_TEMPLATE

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from ...test_processing_common import ProcessorTesterMixin
from ...test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs

# one patch an image, so that packed patches are counted as images are
SLICING = uhd.strategy("llava-1.5").for_vision(image_size=14, patch_size=14).to_dict()
SLICING = json.loads(json.dumps(SLICING))
PATCH = 3 * 14 * 14


class ImageTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, slicing=SLICING, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": UHDImageProcessor, "pil": UHDImageProcessorPil}

    def expected_output_image_shape(self, images):
        return (PATCH,)


class TestImages(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


class VideoTester:
    batch_size, num_frames, num_channels = 5, 8, 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        sizes = self.batch_size, self.num_frames, self.num_channels, 30, 80
        return prepare_video_inputs(*sizes, equal_resolution, return_tensors)

    def expected_output_video_shape(self, videos):
        return (PATCH,)


class TestVideos(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = UHDVideoProcessor
    test_cast_dtype = True
    video_processor_dict = {"slicing": SLICING, "image_mean": [0.5, 0.4, 0.3]}  # noqa: RUF012

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoTester()

    def assert_expected_videos_shape(self, encoded_videos, expected_output_video_shape, num_videos):
        assert encoded_videos.shape == (num_videos * VideoTester.num_frames, *expected_output_video_shape)


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = UHDProcessor

    @classmethod
    def _setup_tokenizer(cls):
        core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        found = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
        found.add_special_tokens({"extra_special_tokens": ["<image>", "<video>"]})
        return found

    @classmethod
    def _setup_image_processor(cls):
        return UHDImageProcessor(slicing=SLICING)

    @classmethod
    def _setup_video_processor(cls):
        return UHDVideoProcessor(slicing=SLICING)

    @staticmethod
    def prepare_processor_dict():
        template = PLAIN_CHAT_TEMPLATE.replace("IMAGE_TOKEN", "<image>").replace("VIDEO_TOKEN", "<video>")
        return {"chat_template": template}
