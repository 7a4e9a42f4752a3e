"""Transformers' own common model tests on teacher, linear and hybrid.

Tests that are skipped here are listed with reasons in `EXCEPTIONS` and in docs/common_tests.md; the suite skips more
by its own conditions.
"""

import unittest
from typing import ClassVar

import torch
from tiny_models import tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device
from transformers_suite import mixins

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaModel


ModelTesterMixin, GenerationTesterMixin = mixins()

# The suite finds out in these tables which class has a head and takes labels.
MODEL_MAPPING_NAMES["mmmamba"] = "MmMambaModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mmmamba"] = "MmMambaForConditionalGeneration"

IMAGE_TOKEN = 3
LAYER_TYPES = {
    "teacher": ["full_attention", "full_attention"],
    "linear": ["linear_attention", "linear_attention"],
    "hybrid": ["linear_attention", "full_attention"],
}
NO_ENCODER = "a patch embedding has no layers: there are no hidden states and no attentions of a vision encoder"
EXCEPTIONS = {
    "test_get_image_features_hidden_states": NO_ENCODER,
    "test_get_image_features_attentions": NO_ENCODER,
    "test_get_image_features_output_0": "picture rows have the decoder's width, so vision_config has none of its own",
    "test_get_image_features_output_1": "picture rows have the decoder's width, so vision_config has none of its own",
    "test_model_rope_scaling_frequencies": "it looks at a buffer of frequencies, which are computed in each call here",
    "test_get_image_features_output_2": "picture rows have the decoder's width, so vision_config has none of its own",
}


class ModelTester:
    """Tiny configurations, and inputs with a picture in each row."""

    batch_size, text_length, image_tokens = 3, 9, 4
    seq_length = encoder_seq_length = text_length + image_tokens
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True

    def __init__(self, kind):
        self.kind = kind

    def get_config(self):
        sizes = {"num_hidden_layers": self.num_hidden_layers, "num_embedding_layers": 1}
        # The suite compares cosines at the longest positions to 1e-5, which fp32 keeps for short contexts only.
        sizes["max_position_embeddings"] = 512
        layers = {"layer_types": LAYER_TYPES[self.kind], "initializer_range": 0.02}
        return tiny_config(self.kind, image_token_id=IMAGE_TOKEN, **sizes, **layers)

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, 80, (self.batch_size, self.seq_length), generator=generator)
        ids[:, 1 : 1 + self.image_tokens] = IMAGE_TOKEN
        pixels = torch.randn(self.batch_size, 3, 16, 16, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return self.get_config(), {name: value.to(torch_device) for name, value in inputs.items()}


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (MmMambaModel, MmMambaForConditionalGeneration)
    all_generative_model_classes = (MmMambaForConditionalGeneration,)
    _is_composite = True
    exceptions: ClassVar[dict[str, str]] = {}

    def setUp(self):
        if reason := EXCEPTIONS.get(self._testMethodName) or self.exceptions.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = ModelTester(self.kind)


class TestTeacher(CommonTests, unittest.TestCase):
    kind = "teacher"


class TestLinear(CommonTests, unittest.TestCase):
    kind = "linear"
    has_attentions = False
    exceptions: ClassVar[dict[str, str]] = dict.fromkeys(
        (f"test_model_rope_scaling_from_config_{case}" for case in ("0_linear", "1_dynamic", "2_yarn")),
        "without attention no layer sees positions, so scaling them changes nothing",
    )


class TestHybrid(CommonTests, unittest.TestCase):
    kind = "hybrid"
    has_attentions = False  # the suite expects one attention map per layer
