"""The network's logits and gradients do not depend on pieces, padding, batches or dtype; bad input is refused."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import enable_checkpointing, tiny_config, tiny_model, token_ids

from mmmamba.cache_mmmamba import CACHE, MmMambaCache
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaRotaryEmbedding, rotate


def prompt(*parts, seed=0):
    """Token ids (1, length) from lengths of text and "tile"."""
    return token_ids(*parts, seed=seed)[None]


def tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 11, 29])
def test_reading_in_pieces_of_any_size_gives_the_logits_of_one_forward(model, size):
    ids, pictures = prompt(5, "tile", "tile", 16), tiles(2)
    expected = model(ids, pixel_values=pictures).logits
    embeds = model.model.embed(ids, None, model.get_image_features(pictures).pooler_output)
    cache, pieces = MmMambaCache(config=model.config.text_config), []
    for piece in embeds.split(size, dim=1):
        pieces.append(model(inputs_embeds=piece, **{CACHE: cache}, use_cache=True).logits)
    close(torch.cat(pieces, 1), expected)
    assert cache.get_seq_length() == ids.shape[1]


def test_pictures_may_come_in_a_later_piece(model):
    ids, pictures = prompt(5, "tile", 6, "tile", 3), tiles(2)
    expected = model(ids, pixel_values=pictures).logits
    cache = model(ids[:, :9], pixel_values=pictures[:1], use_cache=True)[CACHE]
    later = model(ids[:, 9:], pixel_values=pictures[1:], **{CACHE: cache}).logits
    close(later, expected[:, 9:])


def test_many_tokens_may_follow_a_filled_cache(model):
    ids = prompt(40)
    cache = model(ids[:, :17], use_cache=True)[CACHE]
    close(model(ids[:, 17:], **{CACHE: cache}).logits, model(ids).logits[:, 17:])


def padded(rows, side):
    longest = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), 2)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        start = longest - row.shape[1] if side == "left" else 0
        ids[i, start : start + row.shape[1]] = row[0]
        mask[i, start : start + row.shape[1]] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_padding_changes_neither_logits_nor_what_follows(model, side, size):
    rows = [prompt(4, "tile", 9, seed=1), prompt(2, seed=2), prompt("tile", 7, "tile", 3, seed=3)]
    pictures = tiles(3)
    alone = [
        model(rows[0], pixel_values=pictures[:1]).logits,
        model(rows[1]).logits,
        model(rows[2], pixel_values=pictures[1:]).logits,
    ]
    ids, mask = padded(rows, side)
    embeds = model.model.embed(ids, None, model.get_image_features(pictures).pooler_output)
    cache, pieces = MmMambaCache(config=model.config.text_config), []
    for end in range(size, ids.shape[1] + size, size):
        end = min(end, ids.shape[1])
        piece = embeds[:, cache.get_seq_length() : end]
        pieces.append(model(inputs_embeds=piece, attention_mask=mask[:, :end], **{CACHE: cache}).logits)
    logits = torch.cat(pieces, 1)
    for i, expected in enumerate(alone):
        close(logits[i, mask[i].bool()], expected[0])

    # What comes next must continue each row's own last valid step.
    following = prompt(5, seed=9)
    mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    continued = model(following.expand(3, -1), attention_mask=mask, **{CACHE: cache}).logits
    for i, (row, picture) in enumerate(zip(rows, (pictures[:1], None, pictures[1:]), strict=True)):
        whole = model(torch.cat([row, following], 1), pixel_values=picture).logits
        close(continued[i], whole[0, -5:])


def test_positions_follow_the_mask_when_not_given(model):
    ids, mask = padded([prompt(9, seed=1), prompt(4, seed=2)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = model(ids, attention_mask=mask, position_ids=positions).logits
    close(model(ids, attention_mask=mask).logits[mask.bool()], given[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["teacher", "linear", "hybrid"])
def test_every_dtype_gives_the_logits_of_fp64_and_recurrent_states_stay_fp32(kind, dtype):
    exact = tiny_model(kind)
    ids, pictures = prompt(3, "tile", 20), tiles(1)
    expected = exact(ids, pixel_values=pictures).logits
    outputs = copy.deepcopy(exact).to(dtype)(ids, pixel_values=pictures, use_cache=True)
    assert outputs.logits.dtype == dtype
    # Some eight roundings in each of four layers; the per-head norm of small states amplifies some of them.
    assert (outputs.logits.double() - expected).norm() / expected.norm() < 8 * 4 * torch.finfo(dtype).eps
    for index in outputs[CACHE].state_layers:
        assert outputs[CACHE].recurrent_state(index).dtype == torch.float32


def test_logits_to_keep_selects_positions_and_the_loss_is_of_the_next_token(model):
    ids, labels = prompt(12), prompt(12)
    labels[:, :5] = -100
    full = model(ids, labels=labels)
    close(model(ids, logits_to_keep=3).logits, full.logits[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([2, 7])).logits, full.logits[:, [2, 7]])
    expected = torch.nn.functional.cross_entropy(full.logits[0, 4:-1], labels[0, 5:])
    torch.testing.assert_close(full.loss, expected.float())  # the library's loss is computed in fp32


def test_hidden_states_are_returned_for_every_layer(model):
    outputs = model(prompt(6), output_hidden_states=True)
    assert len(outputs.hidden_states) == len(model.model.layers) + 1
    close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


@pytest.mark.parametrize("kind", ["teacher", "linear", "hybrid"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = tiny_model(kind).train().requires_grad_(True)
    ids = prompt(3, "tile", 10)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        model(ids, pixel_values=tiles(1), labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_later_tokens_do_not_change_earlier_logits(model):
    first, second = prompt(10, seed=1), prompt(10, seed=2)
    second[:, :6] = first[:, :6]
    close(model(second).logits[:, :6], model(first).logits[:, :6])


def test_a_saved_and_loaded_model_gives_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = MmMambaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.float64
    close(again(prompt(8)).logits, model(prompt(8)).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": prompt("tile"), "pixel_values": tiles(2)}, "4 image tokens but the pictures give 8 rows"),
        ({"input_ids": prompt(5), "pixel_values": tiles(1)}, "0 image tokens but the pictures give 4 rows"),
        ({"input_ids": prompt("tile"), "pixel_values": tiles(1)[0]}, "shape (3, 16, 16)"),
        ({"input_ids": prompt("tile"), "pixel_values": tiles(1)[..., :12]}, "cannot be shuffled"),
    ],
)
def test_contradicting_inputs_are_an_error_that_says_so(model, arguments, words):
    with pytest.raises(ValueError) as error:
        model(**arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"layer_types": ["full_attention"] * 3 + ["mamba2"]}, "mamba2"),
        ({"layer_types": ["full_attention"]}, "1 entries but num_hidden_layers=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "sulu"}, "sulu"),
        ({"num_embedding_layers": 9}, "num_embedding_layers=9"),
        ({"conv_kernel": 1}, "conv_kernel=1"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_value(text, words):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config("linear", **text)
    assert words in str(error.value)


ROPES = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROPES))
@pytest.mark.parametrize("length", [9, 70])
def test_rotary_positions_are_those_of_transformers_llama(kind, length):
    """Within the original length and beyond it, for every kind of scaling."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    ropes = {"rope_type": kind} | ROPES[kind]
    config = tiny_config("teacher", max_position_embeddings=32, rope_parameters=dict(ropes)).text_config
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
    peer = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(ropes)))
    positions, x = torch.arange(length)[None], torch.randn(1, length, 32)
    actual, expected = MmMambaRotaryEmbedding(config)(x, positions), peer(x, positions)
    torch.testing.assert_close(actual, expected)
    q, k = torch.randn(2, 1, 4, length, 8)
    torch.testing.assert_close((rotate(q, *actual), rotate(k, *actual)), apply_rotary_pos_emb(q, k, *expected))


def test_every_linear_layer_is_torchs_own(model):
    """Quantisation, adapters and offloading look for the type itself."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    attention = model.config.text_config.layer_types.count("full_attention")
    assert len(layers) == 3 * 4 + 4 * attention + 2 * (4 - attention) + 2 + 1  # MLPs, mixers, projector, head
    assert {type(module) for module in layers} == {torch.nn.Linear}


def test_the_backend_of_a_loaded_model_can_be_changed(model):
    """What runs the mixer is asked at each call, so a model that is loaded may be told otherwise."""
    model.config.ssm_implementation = "cuda"
    try:
        with pytest.raises(ValueError, match="ssm_implementation='auto'"):
            model(prompt(5))
    finally:
        model.config.ssm_implementation = "auto"
