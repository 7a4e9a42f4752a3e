"""`generate` gives each row of a batch what it gives alone, whatever the strategy, the cache and the prefill."""

import functools

import pytest
import torch
from tiny_models import LAYER_TYPES, tiny_model, token_ids
from transformers import GenerationConfig

from mmmamba.cache_mmmamba import CACHE, MmMambaCache


STEPS = 6


def prompt(*parts, seed):
    return token_ids(*parts, seed=seed)[None]


# One row with two pictures, one with none, one with one: (ids, tiles).
ROWS = [(prompt(3, "tile", 2, "tile", 4, seed=1), 2), (prompt(5, seed=2), 0), (prompt(6, "tile", 9, seed=3), 1)]


def rows_alone():
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    for (ids, count), tiles in zip(ROWS, pictures.split([count for _, count in ROWS]), strict=True):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"pixel_values": tiles} if count else {})


def batch():
    rows = list(rows_alone())
    longest = max(row["input_ids"].shape[1] for row in rows)

    def left(name, value):
        return torch.cat(
            [torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=value) for row in rows]
        )

    pictures = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
    return {"input_ids": left("input_ids", 2), "attention_mask": left("attention_mask", 0), "pixel_values": pictures}


def generate(model, inputs, **options):
    """New tokens and their logits, (rows, steps) and (rows, steps, vocabulary)."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 2} | options
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return output.sequences[:, -STEPS:], torch.stack(output.logits, 1), output


def close(actual, expected):
    """`generate` rounds logits to fp32; up to that, both are exact."""
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)


def test_a_batch_with_different_pictures_per_row_answers_as_each_row_alone(model):
    tokens, logits, _ = generate(model, batch())
    for i, row in enumerate(rows_alone()):
        alone, expected, _ = generate(model, row)
        assert tokens[i].tolist() == alone[0].tolist()
        close(logits[i], expected[0])


def test_generation_follows_the_plain_run(model):
    for row in rows_alone():
        tokens, logits, _ = generate(model, row)
        whole = torch.cat([row["input_ids"], tokens], 1)
        plain = model(whole, pixel_values=row.get("pixel_values")).logits
        close(logits, plain[:, -STEPS - 1 : -1])


def test_beams_of_a_batch_are_those_of_each_row(model):
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    tokens, _, output = generate(model, batch(), **options)
    for i, row in enumerate(rows_alone()):
        alone, _, expected = generate(model, row, **options)
        assert tokens[2 * i : 2 * i + 2].tolist() == alone.tolist()
        torch.testing.assert_close(output.sequences_scores[2 * i : 2 * i + 2], expected.sequences_scores)
        # A beam's score is the mean log-probability that a plain run gives its tokens.
        whole = torch.cat([row["input_ids"], alone[:1]], 1)
        plain = model(whole, pixel_values=row.get("pixel_values")).logits[:, -STEPS - 1 : -1].log_softmax(-1)
        score = plain.gather(2, alone[:1, :, None]).sum() / STEPS
        torch.testing.assert_close(expected.sequences_scores[0].double(), score, rtol=1e-5, atol=1e-5)


def test_every_sample_is_drawn_from_its_own_rows_logits(model):
    torch.manual_seed(0)
    tokens, logits, _ = generate(model, batch(), do_sample=True, top_k=0, num_return_sequences=3)
    assert len({tuple(row) for row in tokens.tolist()}) == 9
    for i, row in enumerate(rows_alone()):
        for sample in range(3 * i, 3 * i + 3):
            whole = torch.cat([row["input_ids"], tokens[sample : sample + 1]], 1)
            plain = model(whole, pixel_values=row.get("pixel_values")).logits
            close(logits[sample], plain[0, -STEPS - 1 : -1])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_prefill_in_pieces(model, size):
    expected_tokens, expected, _ = generate(model, batch())
    tokens, logits, _ = generate(model, batch(), prefill_chunk_size=size)
    assert tokens.tolist() == expected_tokens.tolist()
    close(logits, expected)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"num_beams": 2}])
@pytest.mark.parametrize("padded", [True, False])
def test_static_cache(model, options, padded):
    inputs = batch() if padded else next(iter(rows_alone()))
    expected_tokens, expected, _ = generate(model, inputs, **options)
    tokens, logits, output = generate(model, inputs, cache_implementation="static", **options)
    capacity = inputs["input_ids"].shape[1] + STEPS
    assert all(output[CACHE].keys(i).shape[2] == capacity for i in output[CACHE].attention_layers)
    assert tokens.tolist() == expected_tokens.tolist()
    close(logits, expected)


def test_the_callers_own_cache_is_filled(model):
    cache = MmMambaCache(config=model.config.text_config)
    expected, _, _ = generate(model, batch())
    tokens, _, output = generate(model, batch(), **{CACHE: cache})
    assert tokens.tolist() == expected.tolist()
    assert output[CACHE] is cache
    assert cache.get_seq_length() == batch()["input_ids"].shape[1] + STEPS - 1


def test_a_second_turn_continues_from_the_first_ones_cache(model):
    for row in rows_alone():
        _, _, first = generate(model, row)
        ids = torch.cat([first.sequences, prompt(7, seed=5)], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pictures = {"pixel_values": row["pixel_values"]} if "pixel_values" in row else {}
        expected_tokens, expected, _ = generate(model, turn | pictures)
        tokens, logits, _ = generate(model, turn, **{CACHE: first[CACHE]})
        assert tokens.tolist() == expected_tokens.tolist()
        close(logits, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_without_a_cache_the_answer_is_the_same(model, options):
    expected, _, _ = generate(model, batch(), **options)
    assert generate(model, batch(), use_cache=False, **options)[0].tolist() == expected.tolist()


def test_rows_stop_on_their_own(model):
    """A row that has ended is padded while the others go on, and does not disturb them."""
    expected, _, _ = generate(model, batch())
    end = int(expected[1, 2])
    tokens, _, _ = generate(model, batch(), eos_token_id=end)
    for row, whole in zip(tokens.tolist(), expected.tolist(), strict=True):
        length = whole.index(end) + 1 if end in whole else STEPS
        assert row == whole[:length] + [2] * (STEPS - length)


@pytest.mark.parametrize("size", [None, 3])
def test_inputs_embeds_generate_the_same(model, size):
    row = next(iter(rows_alone()))
    expected, _, _ = generate(model, row)
    rows = model.model.embed(row["input_ids"], None, model.get_image_features(row["pixel_values"]).pooler_output)
    inputs = {"inputs_embeds": rows, "attention_mask": row["attention_mask"]}
    tokens, _, _ = generate(model, inputs, prefill_chunk_size=size)
    assert tokens.tolist() == expected.tolist()


def test_a_generation_config_of_ones_own(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2)
    row = next(iter(rows_alone()))
    expected, _, _ = generate(model, row)
    tokens = model.generate(**row, generation_config=config)[:, row["input_ids"].shape[1] :]
    assert tokens.tolist() == expected[:, :3].tolist()


def test_memory_of_a_linear_model_does_not_grow():
    """However long the text, the cache has the same size."""
    model = tiny_model("linear")
    sizes = []
    for length in (10, 500):
        cache = model(prompt(length, seed=7), use_cache=True)[CACHE]
        sizes.append({name: tensor.shape for name, tensor in cache.tensors().items()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("beams", [1, 2])
def test_too_few_pictures_are_refused_in_words(model, beams):
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(ValueError, match="image tokens but the pictures give"):
        generate(model, inputs, num_beams=beams)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ((5, 0, 9), "read 0 tokens, but with 5 tokens given and a sequence of 9 .* should have read 4 to 8"),
        ((5, 8, None), "read 8 tokens, but with 5 tokens given and a sequence of 5 .* should have read 0 to 4"),
        ((5, 5, 5), "read 5 tokens, but with 5 tokens given"),
    ],
)
@pytest.mark.parametrize("size", [None, 3])
def test_tokens_mask_and_cache_that_contradict_each_other_are_refused_in_words(model, lengths, words, size):
    new, read, mask = lengths
    cache = model.new_cache()
    if read:
        model(prompt(read, seed=1), **{CACHE: cache})
    inputs = {} if mask is None else {"attention_mask": torch.ones(1, mask, dtype=torch.long)}
    with pytest.raises(ValueError, match=words):
        model.generate(prompt(new, seed=2), **inputs, **{CACHE: cache}, prefill_chunk_size=size, max_new_tokens=3)
    with pytest.raises(ValueError, match="holds 1 rows and the prompt has 2"):
        model(prompt(4, seed=3), **{CACHE: (filled := model.new_cache())})
        model.generate(prompt(9, seed=3).expand(2, -1), **{CACHE: filled})


def test_caches_that_there_are_not_are_refused_in_words(model):
    row = next(iter(rows_alone()))
    with pytest.raises(ValueError, match=r"'quantized' is not among this model's caches: 'dynamic'"):
        generate(model, row, cache_implementation="quantized")
    with pytest.raises(ValueError, match="makes a cache, and one was given"):
        generate(model, row, cache_implementation="static", **{CACHE: model.new_cache()})


def test_a_default_cache_of_the_models_own_generation_config(model):
    row = next(iter(rows_alone()))
    expected, _, _ = generate(model, row)
    model.generation_config.cache_implementation = "static"
    try:
        tokens, _, output = generate(model, row)
    finally:
        model.generation_config.cache_implementation = None
    assert tokens.tolist() == expected.tolist()
    assert all(output[CACHE].keys(i).shape[2] > 20 for i in output[CACHE].attention_layers)


@pytest.mark.deprecations("Transformers' own assistant passes options beside a generation config")
def test_a_teacher_may_be_assisted_and_states_say_that_they_cannot():
    for kind in LAYER_TYPES:
        model, row = tiny_model(kind), {"input_ids": prompt(9, seed=4)}
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        if kind == "teacher":
            expected = model.generate(**row, **options)
            assert torch.equal(model.generate(**row, **options, prompt_lookup_num_tokens=2), expected)
            smaller = tiny_model("teacher", hidden_size=16, intermediate_size=24)
            for assistant in (tiny_model("teacher"), smaller):
                assert torch.equal(model.generate(**row, **options, assistant_model=assistant), expected)
        else:
            with pytest.raises(ValueError, match="stateful"):
                model.generate(**row, **options, prompt_lookup_num_tokens=2)


@pytest.mark.deprecations("Transformers' own assistant passes options beside a generation config")
def test_an_assistant_of_any_size_reads_the_pictures_itself(monkeypatch):
    model, smaller = tiny_model("teacher"), tiny_model("teacher", hidden_size=16, intermediate_size=24)
    row, options = next(rows_alone()), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**row, **options)
    assert torch.equal(model.generate(**row, **options, assistant_model=smaller), expected)
    # An assistant that is the model's own copy guesses right only if it sees what the model sees.
    assistant, steps, forward = tiny_model("teacher"), [], type(model).forward

    @functools.wraps(forward)
    def counting(self, *args, **kwargs):
        steps.append(self is model)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    assistant.generation_config.assistant_confidence_threshold = 0
    assert torch.equal(model.generate(**row, **options, assistant_model=assistant), expected)
    assert sum(steps) == 1


def test_whoever_replaces_the_hook_gets_the_whole_prompt(model, monkeypatch):
    """As PEFT's prompt tuning does, which puts virtual tokens before the prompt of the first step."""
    ids, options = prompt(9, seed=4), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    virtual = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).double()
    plain, sizes = model.prepare_inputs_for_generation, []

    def prepare(input_ids, *args, **kwargs):
        inputs = plain(input_ids, *args, **kwargs)
        sizes.append(inputs["input_ids"].shape[1])
        if inputs["past_key_values"].get_seq_length() == 0:
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat([virtual, embeds], 1)
        inputs["attention_mask"] = inputs["position_ids"] = None
        return inputs

    with monkeypatch.context() as patch:
        patch.setitem(vars(model), "prepare_inputs_for_generation", prepare)
        tokens = model.generate(ids, **options)[:, 9:]
    assert sizes == [9, 1, 1, 1, 1]
    embeds = torch.cat([virtual, model.get_input_embeddings()(ids)], 1)
    for step in range(5):
        assert model(inputs_embeds=embeds).logits[0, -1].argmax() == tokens[0, step]
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[:, step : step + 1])], 1)


def test_a_refused_call_leaves_the_cache_as_it_was(model):
    cache = model.new_cache()
    model(prompt(9, seed=1), **{CACHE: cache})
    whole = {"input_ids": torch.cat([prompt(9, seed=1), prompt(5, seed=2)], 1), CACHE: cache}
    for options in ({"do_sample": False, "num_return_sequences": 3}, {"misspelled": 3}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError):
            model.generate(**whole, **options)
        assert cache.get_seq_length() == 9 and cache.batch_size == 1
    with pytest.raises(ValueError, match="use_cache=False and a cache contradict"):
        model.generate(**whole, use_cache=False)


def test_embeddings_need_a_cache_and_nothing_at_all_begins_with_bos(model):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    ids = prompt(9, seed=4)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **options)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, use_cache=False, **options), expected)
    assert torch.equal(model.generate(bos_token_id=1, **options), model.generate(torch.tensor([[1]]), **options))


def test_a_cache_that_is_too_short_is_refused_in_words():
    model = tiny_model("hybrid")
    cache = MmMambaCache(model.config, max_cache_len=12)
    with pytest.raises(ValueError, match="room for 12 tokens, and 9 with up to 6 new ones need more"):
        model.generate(prompt(9, seed=1), **{CACHE: cache}, max_new_tokens=6)


def test_lists_and_arrays_of_tiles_are_taken_as_tensors_are(model):
    inputs, options = next(rows_alone()), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    pictures = inputs.pop("pixel_values")
    expected = model.generate(**inputs, pixel_values=pictures, **options)
    logits = model(**inputs, pixel_values=pictures).logits
    for given in (list(pictures), [*pictures.split(1)], pictures.numpy()):
        assert torch.equal(model.generate(**inputs, pixel_values=given, **options), expected)
        assert torch.equal(model(**inputs, pixel_values=given).logits, logits)


def test_what_cannot_be_done_here_is_refused_in_one_sentence(model):
    for options, words in (
        ({"cache_implementation": "offloaded"}, "the model is on a CPU"),
        ({"assistant_early_exit": 2}, "prompt_lookup_num_tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(prompt(9, seed=1), **options, max_new_tokens=4)
