"""Parity with upstream: logits, losses, states, decoding and greedy answers of the golden fixtures.

Tolerances are explained in the fixtures' README: softmax models differ by rounding alone, which the per-head norm of
small recurrent outputs amplifies. A layer by itself accumulates no error, so its tolerance is tight for both.
"""

import copy

import pytest
import torch
from golden_checkpoints import GOLDEN, checkpoint
from safetensors.torch import load_file

from mmmamba.cache_mmmamba import CACHE
from mmmamba.conversion.convert import convert
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


MAMBA = ["mmmamba_linear_tiny", "mmmamba_hybrid_tiny"]
TEACHERS = ["hovle_tiny", "hovle_tiny_special", "hovle_tiny_pixshuf_pre"]
HD = "hovle_tiny_pixshuf_post"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Converts a fixture's checkpoint once and loads it."""
    models = {}

    def load(name):
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            convert(checkpoint(folder / "src", name), folder / "out")
            models[name] = MmMambaForConditionalGeneration.from_pretrained(folder / "out").eval()
            models[name].requires_grad_(False)
        return models[name]

    return load


def read_case(name, case):
    """A case's inputs by argument name, and its outputs."""
    tensors = load_file(GOLDEN / name / f"case_{case}.safetensors")
    inputs = {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("in.")}
    for key in ("hd_input_ids", "hd_attention_mask"):  # made inside of our model
        inputs.pop(key, None)
    return inputs, {key[4:]: tensor for key, tensor in tensors.items() if key.startswith("out.")}


def assert_near(actual, expected, name):
    tolerance = {"atol": 3e-3, "rtol": 1e-3} if name in MAMBA else {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(actual, expected, **tolerance)


TEACHER_CASES = [(name, case) for name in TEACHERS for case in ("text", "image")]


@pytest.mark.parametrize(("name", "case"), [*TEACHER_CASES, ("hovle_tiny", "batch2"), (HD, "image")])
def test_the_teachers_logits_and_loss_are_upstreams(load, name, case):
    inputs, expected = read_case(name, case)
    outputs = load(name)(**inputs)
    assert_near(outputs.logits, expected["logits"], name)
    if "loss" in expected:
        assert_near(outputs.loss, expected["loss"].reshape(()), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_of_the_hd_teacher_is_upstreams(load, dtype):
    """Its embedding layers read 16 patches for the 4 image tokens of each tile."""
    inputs, expected = read_case(HD, "image")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    hidden = copy.deepcopy(load(HD)).to(dtype)(**inputs, output_hidden_states=True).hidden_states
    names = ["embedding_input", *(f"embedding_layer_{i}" for i in range(7)), "llm_inputs_embeds", "llm_layer_0"]
    for actual, name in zip(hidden, [*names, "llm_norm"], strict=True):
        assert_near(actual.float(), expected[name], HD)


def test_the_teachers_logits_with_left_padding_are_upstreams(load):
    inputs, expected = read_case("hovle_tiny", "leftpad_flash")
    valid = inputs["attention_mask"].bool()
    for given in (inputs, {key: value for key, value in inputs.items() if key != "position_ids"}):
        assert_near(load("hovle_tiny")(**given).logits[valid], expected["logits"][valid], "hovle_tiny")


@pytest.mark.parametrize("size", ["84x84", "56x84", "28x28"])
def test_embeddings_of_tiles_of_other_sizes_are_upstreams(load, size):
    inputs, expected = read_case("hovle_tiny", "vision_resize")
    rows = load("hovle_tiny").get_image_features(inputs[f"pixel_values_{size}"]).pooler_output
    assert_near(rows, expected[f"vision_embeddings_{size}"], "hovle_tiny")


def compare_states(cache, expected, moment, name):
    """Compares every stored layer's state, in upstream's shapes; returns how many there were."""
    compared = 0
    for index in range(len(cache.layers)):
        if f"{moment}.ssm_state.{index}" in expected:
            conv, state = expected[f"{moment}.conv_state.{index}"], expected[f"{moment}.ssm_state.{index}"]
            assert_near(cache.conv_state(index).reshape(conv.shape), conv, name)
            assert_near(cache.recurrent_state(index).reshape(state.shape), state, name)
        elif f"{moment}.kv_cache.{index}" in expected:
            keys, values = expected[f"{moment}.kv_cache.{index}"].unbind(2)
            assert_near(cache.keys(index).transpose(1, 2), keys, name)
            assert_near(cache.values(index).transpose(1, 2), values, name)
        else:
            continue
        compared += 1
    return compared


@pytest.mark.parametrize("name", MAMBA)
@pytest.mark.parametrize("case", ["text", "image", "long", "batch2"])
def test_the_students_logits_states_and_decoding_are_upstreams(load, name, case):
    model = load(name)
    inputs, expected = read_case(name, case)
    decode = inputs.pop("decode_ids")
    outputs = model(**inputs, use_cache=True)
    assert_near(outputs.logits, expected["prefill_logits"], name)
    cache = outputs[CACHE]
    assert compare_states(cache, expected, "prefill", name) == len(cache.layers)
    steps = [model(token, **{CACHE: cache}).logits for token in decode.split(1, dim=1)]
    assert_near(torch.cat(steps, 1), expected["decode_logits"], name)
    stored = any(key.startswith("final.") for key in expected)
    assert compare_states(cache, expected, "final", name) == (len(cache.layers) if stored else 0)


@pytest.mark.parametrize("name", MAMBA)
@pytest.mark.parametrize("case", ["text", "image"])
def test_each_layer_alone_is_upstreams(load, name, case):
    """Layer i + 1 gets upstream's output of layer i, so errors do not accumulate."""
    model = load(name)
    _, expected = read_case(name, case)
    hidden = [expected[f"layer.{i}"] for i in range(len(model.model.layers))]
    positions = torch.arange(hidden[0].shape[1])[None]
    for index, layer in enumerate(model.model.layers[1:], start=1):
        embedding = index < model.config.text_config.num_embedding_layers
        rotary = model.model.embedding_rotary_emb if embedding else model.model.rotary_emb
        actual = layer(hidden[index - 1], position_embeddings=rotary(hidden[index - 1], positions))
        torch.testing.assert_close(actual, hidden[index], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["hovle_tiny", *MAMBA])
def test_greedy_continuations_are_upstreams(load, name):
    inputs, expected = read_case(name, "greedy")
    count = expected["greedy_ids"].shape[1]
    output = load(name).generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=count, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected["greedy_ids"].tolist()
