"""`from_pretrained` takes the arguments of upstream's model cards, and none that nobody knows."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import BitsAndBytesConfig

from mmmamba import loading_mmmamba
from mmmamba.loading_mmmamba import renamed_arguments
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("hybrid").float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_the_arguments_of_internvls_cards_are_taken(folder, use_flash_attn, recwarn):
    arguments = {"low_cpu_mem_usage": True, "load_in_8bit": False, "load_in_4bit": False}
    model = MmMambaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.bfloat16, use_flash_attn=use_flash_attn, **arguments
    )
    assert model.dtype == torch.bfloat16
    expected = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    if not torch.cuda.is_available():
        assert model.config._attn_implementation == expected.config._attn_implementation
    assert not [str(warning.message) for warning in recwarn]


def test_flash_attention_is_used_where_it_can_be(monkeypatch):
    for dtype in (torch.bfloat16, "float16"):
        for name in ("dtype", "torch_dtype"):
            given = {"use_flash_attn": True, name: dtype}
            monkeypatch.setattr(loading_mmmamba, "is_flash_attn_2_available", lambda: True)
            assert renamed_arguments(given) == {name: dtype, "attn_implementation": "flash_attention_2"}
            assert renamed_arguments(given | {"attn_implementation": "sdpa"})["attn_implementation"] == "sdpa"
            monkeypatch.setattr(loading_mmmamba, "is_flash_attn_2_available", lambda: False)
            assert renamed_arguments(given) == {name: dtype}
    monkeypatch.setattr(loading_mmmamba, "is_flash_attn_2_available", lambda: True)
    assert renamed_arguments({"use_flash_attn": True, "dtype": torch.float32}) == {"dtype": torch.float32}
    assert renamed_arguments({"use_flash_attn": False, "dtype": torch.float16}) == {"dtype": torch.float16}


def test_bits_become_a_quantization_config():
    found = renamed_arguments({"load_in_8bit": True})
    assert isinstance(found["quantization_config"], BitsAndBytesConfig) and found["quantization_config"].load_in_8bit
    with pytest.raises(ValueError, match="give quantization_config alone"):
        renamed_arguments({"load_in_8bit": True, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)})


def test_unknown_arguments_are_refused(folder):
    with pytest.raises(TypeError, match="use_flash_attention_3"):
        MmMambaForConditionalGeneration.from_pretrained(folder, use_flash_attention_3=True)
