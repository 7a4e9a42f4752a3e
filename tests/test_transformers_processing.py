"""Transformers' own common tests on the tokenizers, the image processors and the processor.

Tests that are skipped here are listed with reasons in `exceptions` and in docs/common_tests.md; the suites skip more
by their own conditions.
"""

import functools
import tempfile
import unittest
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor
from transformers_suite import suite

from mmmamba.conversion.convert import chat_template
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTokenizer, MmMambaTokenizerFast
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor


VOCABULARY = Path(__file__).parent / "golden" / "tokenizer" / "tokenizer.model"
TokenizerTesterMixin = suite("test_tokenization_common").TokenizerTesterMixin
ProcessorTesterMixin = suite("test_processing_common").ProcessorTesterMixin
images = suite("test_image_processing_common")


@pytest.fixture(scope="module", autouse=True)
def trusted_code():
    """The suite loads folders without `trust_remote_code=True`, which code of the folder's own needs."""
    with pytest.MonkeyPatch.context() as patch:
        for auto in (AutoTokenizer, AutoImageProcessor, AutoVideoProcessor, AutoProcessor):
            load = auto.from_pretrained
            trusted = functools.partial(load, trust_remote_code=True)
            patch.setattr(auto, "from_pretrained", trusted)
        yield


class SkipsExceptions:
    exceptions: ClassVar[dict[str, str]] = {}

    def setUp(self):
        self.skip_if_exception()
        super().setUp()

    def skip_if_exception(self):
        if reason := self.exceptions.get(self._testMethodName):
            self.skipTest(reason)


class TokenizerTests(SkipsExceptions, TokenizerTesterMixin):
    @classmethod
    def setUpClass(cls):
        # As the suite does, but for a text that its source distribution lacks and a folder of the Hub.
        cls._data = "This is a text.\nIt has lines, and numbers: 12."
        cls.tmpdirname = tempfile.mkdtemp()
        cls.tokenizer_class(str(VOCABULARY)).save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]


class TestFastTokenizer(TokenizerTests, unittest.TestCase):
    tokenizer_class = rust_tokenizer_class = MmMambaTokenizerFast


class TestSlowTokenizer(TokenizerTests, unittest.TestCase):
    tokenizer_class = MmMambaTokenizer
    test_sentencepiece = True
    exceptions: ClassVar[dict[str, str]] = {
        "test_pretokenized_inputs": "a text gets a space in front: before ' a' stand two, before 'a' one",
    }


class TestProcessor(SkipsExceptions, ProcessorTesterMixin, unittest.TestCase):
    processor_class = MmMambaProcessor
    videos_input_name = "pixel_values"  # tiles of pictures and frames stand in one tensor
    image_processor_class = MmMambaImageProcessor
    exceptions: ClassVar[dict[str, str]] = dict.fromkeys(
        ("test_processor_from_and_save_pretrained", "test_processor_from_and_save_pretrained_as_nested_dict"),
        "a processor with code of its own notes where the code is when it is saved",
    ) | dict.fromkeys(
        (
            "test_apply_chat_template_decoded_video_0",
            "test_apply_chat_template_video_0",
            "test_apply_chat_template_video_1",
            "test_apply_chat_template_video_frame_sampling",
        ),
        "tiles of all frames stand in one tensor; the test wants a dimension for videos and one for frames",
    )

    @classmethod
    def _setup_image_processor(cls):
        return cls.image_processor_class(size={"height": 16, "width": 16}, max_patches=2)

    @classmethod
    def _setup_video_processor(cls):
        return MmMambaVideoProcessor(size={"height": 16, "width": 16})

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = MmMambaTokenizerFast(str(VOCABULARY))
        tokenizer.chat_template = chat_template("internlm2-chat")
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"tokens_per_tile": 4}


class ImageProcessingTester(images.ImageProcessingTester):
    batch_size, num_channels, min_resolution, max_resolution = 3, 3, 30, 100
    size: ClassVar[dict[str, int]] = {"height": 18, "width": 18}

    def __init__(self):
        pass  # the suite would look the classes up

    def prepare_image_processor_dict(self):
        return TestImageProcessors.image_processor_dict


class TestImageProcessors(SkipsExceptions, images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessingTester
    # The suite looks these up by the name of a folder in Transformers.
    image_processing_classes: ClassVar[dict[str, type]] = {
        "torchvision": MmMambaImageProcessor,
        "pil": MmMambaImageProcessorPil,
    }
    image_processor_dict: ClassVar[dict] = {"size": ImageProcessingTester.size, "max_patches": 1}

    exceptions: ClassVar[dict[str, str]] = {
        "test_call_numpy_4_channels": "arrays of four channels are pictures with transparency and become RGB",
    }

    def setUp(self):
        self.skip_if_exception()
        self.image_processor_tester = self.image_processor_tester_class()
