"""Sequences packed into one row give the logits, states and gradients that each gives alone."""

import pytest
import torch
from tiny_models import IMAGE_TOKEN, LAYER_TYPES, TILE_TOKENS, enable_checkpointing, tiny_model, token_ids
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.masking_utils import flash_attention_mask

from mmmamba.cache_mmmamba import CACHE, MmMambaCache
from mmmamba.ssm_mmmamba import Sequences


# Lengths 1, 9, 26, 1, 8, 2: below and above the chunk size of 8, single tokens, pictures in two of them.
FIRST_ROW = [
    token_ids(1, seed=1),
    token_ids(3, "tile", 2, seed=2),
    token_ids("tile", 13, "tile", 5, seed=3),
    token_ids(1, seed=4),
    token_ids(8, seed=5),
    token_ids(2, seed=6),
]
# Lengths 17 and 30, with the same sum.
SECOND_ROW = [token_ids(17, seed=7), token_ids(4, "tile", 22, seed=8)]


def tiles_of(sequences):
    return [int((ids == IMAGE_TOKEN).sum()) // TILE_TOKENS for ids in sequences]


def pictures_of(sequences):
    count = sum(tiles_of(sequences))
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def packed(*rows):
    """A model's inputs: every row flattened, positions restarting with each of its sequences."""
    return {
        "input_ids": torch.stack([torch.cat(row) for row in rows]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(ids)) for ids in row]) for row in rows]),
        "pixel_values": pictures_of([ids for row in rows for ids in row]),
    }


def one_by_one(*rows):
    """The same sequences as inputs of a model run once for each."""
    sequences = [ids for row in rows for ids in row]
    for ids, tiles in zip(sequences, pictures_of(sequences).split(tiles_of(sequences)), strict=True):
        yield {"input_ids": ids[None]} | ({"pixel_values": tiles} if len(tiles) else {})


def alone(model, *rows):
    """Logits of each sequence run by itself, laid out like the packed batch: (rows, length, vocabulary)."""
    logits = [model(**inputs).logits[0] for inputs in one_by_one(*rows)]
    return torch.cat(logits).unflatten(0, (len(rows), -1))


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request):
    return request.param


@pytest.fixture(params=list(LAYER_TYPES))
def model(request, attention):
    model = tiny_model(request.param)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture
def tolerance(model, attention):
    """Eager attention takes its softmax in fp32, whatever the model's dtype."""
    rounded = attention == "eager" and "full_attention" in model.config.text_config.layer_types
    return 1e-4 if rounded else 1e-10


def test_packed_sequences_have_the_logits_and_hidden_states_of_each_alone(model, tolerance):
    outputs = model(**packed(FIRST_ROW), output_hidden_states=True)
    close(outputs.logits, alone(model, FIRST_ROW), tolerance)
    runs = [model(**inputs, output_hidden_states=True).hidden_states for inputs in one_by_one(FIRST_ROW)]
    for hidden_states, *expected in zip(outputs.hidden_states, *runs, strict=True):
        close(hidden_states, torch.cat(expected, 1), tolerance)


def test_rows_of_a_batch_may_be_packed_with_different_boundaries(model, tolerance):
    close(model(**packed(FIRST_ROW, SECOND_ROW)).logits, alone(model, FIRST_ROW, SECOND_ROW), tolerance)


def test_a_batch_may_mix_packed_rows_and_rows_of_one_sequence(model, tolerance):
    rows = [token_ids(13, seed=1), token_ids(6, seed=2)], [token_ids(19, seed=3)]
    inputs = packed(*rows)
    del inputs["pixel_values"]
    close(model(**inputs).logits, alone(model, *rows), tolerance)


def test_sequences_of_one_token_each_may_be_packed(model, tolerance):
    inputs = {"input_ids": token_ids(7, seed=1)[None], "position_ids": torch.zeros(1, 7, dtype=torch.long)}
    expected = torch.cat([model(token[None, None]).logits for token in inputs["input_ids"][0]], 1)
    close(model(**inputs).logits, expected, tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_give_every_parameter_the_gradient_of_each_alone(model, tolerance, checkpointing):
    model.train().requires_grad_(True)
    if checkpointing:
        enable_checkpointing(model)
    size = (2, 47, model.config.text_config.vocab_size)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1)).double()

    def gradients(logits):
        model.zero_grad()
        (logits * upstream).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(alone(model, FIRST_ROW, SECOND_ROW))
    actual = gradients(model(**packed(FIRST_ROW, SECOND_ROW)).logits)
    assert all(gradient is not None for gradient in expected.values())
    for name, gradient in actual.items():
        close(gradient, expected[name], tolerance)


def test_the_loss_of_a_flattened_batch_is_the_mean_over_its_sequences_tokens(model):
    texts = [{"input_ids": token_ids(length, seed=length)} for length in (5, 1, 19, 8)]
    batch = DataCollatorWithFlattening()(texts)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    tokens = [
        torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        for ids in (text["input_ids"] for text in texts)
    ]
    torch.testing.assert_close(model(**batch).loss, torch.cat(tokens).mean().float())


def test_position_ids_of_one_row_are_broadcast_over_the_batch(model, tolerance):
    rows = [token_ids(5, seed=1), token_ids(14, seed=2)], [token_ids(5, seed=3), token_ids(14, seed=4)]
    inputs = packed(*rows)
    close(
        model(inputs["input_ids"], position_ids=inputs["position_ids"][:1]).logits,
        alone(model, *rows),
        tolerance,
    )


@pytest.mark.parametrize("rows", [(FIRST_ROW,), (FIRST_ROW, SECOND_ROW)], ids=["one row", "two rows"])
@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_attention_kernels_without_a_mask_get_the_sequence_boundaries(kind, rows):
    """As flash attention does: no mask, boundaries over the flattened batch."""

    def by_boundaries(module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch = len(query)
        groups = query.shape[1] // key.shape[1]
        query, key, value = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))  # (heads, steps, head_dim)
        assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
        assert kwargs["cu_seq_lens_q"].dtype == torch.int32
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0), is_causal=True, scale=scaling
            )
            for q, k, v in zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(pieces, 1).unflatten(1, (batch, -1)).permute(1, 2, 0, 3), None

    AttentionInterface.register("by_boundaries", by_boundaries)
    AttentionMaskInterface.register("by_boundaries", flash_attention_mask)
    expected = alone(tiny_model(kind), *rows)
    model = tiny_model(kind)
    model.set_attn_implementation("by_boundaries")
    close(model(**packed(*rows)).logits, expected)


@pytest.mark.parametrize("kind", list(LAYER_TYPES))
def test_a_packed_row_with_a_cache_is_an_error_that_says_so(kind):
    model, inputs = tiny_model(kind), packed(FIRST_ROW)
    cache = MmMambaCache(config=model.config.text_config)
    for arguments in ({"use_cache": True}, {CACHE: cache}, {CACHE: cache, "use_cache": False}):
        with pytest.raises(ValueError, match=r"one state per row; pass use_cache=False and no cache"):
            model(**inputs, **arguments)
    for arguments in ({}, {"use_cache": False}):
        assert getattr(model(**inputs, **arguments), CACHE) is None
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", list(LAYER_TYPES))
def test_rows_with_an_attention_mask_are_never_taken_for_packed(kind):
    """Positions of left-padded rows restart, too; such rows may fill a cache."""
    model = tiny_model(kind)
    row, following = token_ids(11, seed=1), token_ids(3, seed=2)
    ids = torch.stack([torch.cat([torch.full((4,), 2), row]), token_ids(15, seed=3)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    outputs = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    close(outputs.logits[0, 4:], model(row[None]).logits[0])
    close(outputs.logits[1], model(ids[1:]).logits[0])
    continued = model(
        following.expand(2, -1),
        attention_mask=torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1),
        position_ids=positions[:, -1:] + torch.arange(1, 4),
        **{CACHE: outputs[CACHE]},
    ).logits
    close(continued[0], model(torch.cat([row, following])[None]).logits[0, -3:])
    close(continued[1], model(torch.cat([ids[1], following])[None]).logits[0, -3:])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 9, dtype=torch.long),
        torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
        {"full_attention": None, "linear_attention": None},
    ],
    ids=["flat", "square", "prepared"],
)
def test_with_a_mask_of_any_form_rows_are_not_taken_for_packed(mask):
    model, ids = tiny_model("linear"), token_ids(9, seed=1)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    close(model(ids, attention_mask=mask, position_ids=positions, use_cache=True).logits, model(ids).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", list(LAYER_TYPES))
def test_generation_never_checks_positions_for_packing(kind, use_cache, monkeypatch):
    def fail(position_ids):
        raise AssertionError("generation would wait for the device at every step")

    monkeypatch.setattr(Sequences, "from_position_ids", fail)
    model = tiny_model(kind)
    rows = [token_ids(4, seed=1), token_ids(11, seed=2)]
    ids = torch.stack([torch.nn.functional.pad(row, (11 - len(row), 0), value=2) for row in rows])
    mask = torch.stack([torch.arange(11) >= 11 - len(row) for row in rows]).long()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    batch = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)[:, 11:]
    for row, answer in zip(rows, batch, strict=True):
        ids = row[None]
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert answer.tolist() == ids[0, len(row) :].tolist()


def test_packing_and_padding_steps_are_undone_exactly():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    steps = torch.arange(15.0).view(3, 5, 1) + 1
    for sequences, rows, valid in (
        (Sequences.from_mask(mask), [[2, 4, 5], [6, 7, 8], []], mask),
        (Sequences.from_position_ids(positions), [[1, 2], [3], [4, 5], [6, 7, 8, 9, 10], [11, 12], [13, 14, 15]], 1),
    ):
        packed_steps = sequences.pack(steps)
        assert packed_steps.flatten().tolist() == [step for row in rows for step in row]
        longest = max(map(len, rows))
        padded = sequences.to_padded(packed_steps)
        assert padded[..., 0].tolist() == [row + [0] * (longest - len(row)) for row in rows]
        assert torch.equal(sequences.from_padded(padded), packed_steps)
        assert torch.equal(sequences.unpack(packed_steps)[..., 0], steps[..., 0] * valid)
    assert Sequences.from_mask(mask).lengths.tolist() == [3, 3, 0]
    assert Sequences.from_position_ids(positions).lengths.tolist() == [2, 1, 2, 5, 2, 3]
    assert Sequences.from_mask(torch.ones(2, 5)) is None
    assert Sequences.from_position_ids(torch.arange(5).expand(2, 5) + torch.tensor([[0], [3]])) is None


def test_a_square_mask_is_padding_or_refused():
    """Attention takes any square mask; a state can leave out padding, but forget nothing that it has read."""
    model, ids = tiny_model("hybrid"), torch.stack([token_ids(9, seed=1), token_ids(9, seed=2)])
    padding = (torch.arange(9) >= torch.tensor([[0], [3]])).long()
    square = torch.ones(9, 9, dtype=torch.bool).tril() & padding[:, None].bool()
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=padding, position_ids=positions).logits[padding.bool()]
    close(model(ids, attention_mask=square[:, None], position_ids=positions).logits[padding.bool()], expected)
    square[0, 5:, :5] = False
    for mask, words in (
        (square[:, None], "hides more of the past than padding"),
        (padding[:, :4], "9 tokens are given"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny_model("linear")(ids, attention_mask=mask)
