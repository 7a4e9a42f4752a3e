"""Recorded decoding steps. Without a GPU, a stand-in for a CUDA graph repeats the same work on the same tensors."""

import copy

import pytest
import torch
from tiny_models import tiny_model, token_ids
from transformers.cache_utils import DynamicLayer

from mmmamba import attention_mmmamba, cache_mmmamba, capture_mmmamba, generation_mmmamba
from mmmamba.cache_mmmamba import CACHE
from mmmamba.capture_mmmamba import RecordedStep


ORDINARY = {"MmMambaKeyValueLayer", "LinearAttentionLayer"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True}


@pytest.fixture
def replays(monkeypatch):
    """Counts replays; on a CPU, records by keeping the function and its first result."""
    count = []
    record = capture_mmmamba.record

    def stand_in(run, undo, device):
        result = run().clone()
        undo()
        return lambda: result.copy_(run()), result

    def counting(*arguments):
        replay, result = (record if DEVICE == "cuda" else stand_in)(*arguments)
        return lambda: (count.append(1), replay()), result

    monkeypatch.setattr(capture_mmmamba, "record", counting)
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_mmmamba, "SPLITS", 2)  # one after the other in the interpreter
        monkeypatch.setattr(generation_mmmamba, "recordable", lambda model, cache: cache is not None)
    return count


LAYER_TYPES = {  # few, since the interpreter takes a second for ten steps of one attention layer
    "teacher": ["full_attention", "full_attention"],
    "linear": ["linear_attention", "linear_attention"],
    "hybrid": ["linear_attention", "full_attention"],
}


@pytest.fixture(scope="module", params=list(LAYER_TYPES))
def model(request):
    layers = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "num_embedding_layers": 1,
        "layer_types": LAYER_TYPES[request.param],
    }
    return tiny_model("linear", **layers).float().to(DEVICE)


def padded(*lengths):
    ids = [token_ids(length, seed=length) for length in lengths]
    longest = max(lengths)
    rows = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=2) for row in ids])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": rows.to(DEVICE), "attention_mask": mask.to(DEVICE)}


@pytest.mark.parametrize("lengths", [(7,), (40, 3), (5, 5, 70)], ids=["one", "padded", "long"])
def test_recorded_steps_say_what_plain_ones_say(model, replays, lengths):
    inputs = padded(*lengths)
    plain = model.generate(**inputs, max_new_tokens=12, output_logits=True, disable_compile=True, **OPTIONS)
    assert not replays
    recorded = model.generate(**inputs, max_new_tokens=12, output_logits=True, **OPTIONS)
    assert len(replays) == 11
    assert torch.equal(recorded.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


def test_the_cache_is_an_ordinary_one_afterwards(model, replays):
    inputs = padded(12)
    caches = [
        model.generate(**inputs, max_new_tokens=10, disable_compile=plain, **OPTIONS)[CACHE] for plain in (True, False)
    ]
    assert len(replays) == 9
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 21
    for expected, layer in zip(*(cache.layers for cache in caches), strict=True):
        assert type(layer) is type(expected)
        names = ("keys", "values") if isinstance(layer, DynamicLayer) else ("conv_states", "recurrent_states")
        for name in names:
            pair = [
                getattr(x, name) if isinstance(layer, DynamicLayer) else getattr(x, name)[0] for x in (layer, expected)
            ]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    more = token_ids(5, seed=9)[None].to(DEVICE)
    logits = [model(more, **{CACHE: copy.deepcopy(cache)}).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_answer_leaves_an_ordinary_cache(model, replays):
    cache = model.new_cache()

    class Interrupting:
        def put(self, value):
            if len(replays) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**padded(12), **{CACHE: cache}, max_new_tokens=20, streamer=Interrupting(), **OPTIONS)
    assert cache.get_seq_length() == 15
    assert {type(layer).__name__ for layer in cache.layers} <= ORDINARY


@pytest.mark.parametrize("moment", ["before", "during", "after", "fixing"])
@pytest.mark.parametrize("kind", [RuntimeError, ImportError, Exception])  # Triton's own errors are plain exceptions
def test_where_recording_fails_steps_run_as_ever(model, replays, monkeypatch, moment, kind):
    expected = model.generate(**padded(9), max_new_tokens=12, disable_compile=True, **OPTIONS)

    def fail(run, undo, device):
        if moment == "during":
            last = model.model.layers[-1]
            monkeypatch.setattr(last.mlp, "forward", lambda x: broken())
        if moment != "before":
            run()
        broken()

    def broken():
        monkeypatch.undo()
        raise kind("operation not permitted when stream is capturing")

    update = cache_mmmamba.StaticLayer.update

    def fail_at_the_last(layer, *arguments):
        if len(layers := [*fixed, layer]) == len(attends):
            broken()
        fixed[:] = layers
        return update(layer, *arguments)

    attends = [kind for kind in model.config.text_config.layer_types if kind == "full_attention"]
    fixed = []
    if moment == "fixing":
        monkeypatch.setattr(cache_mmmamba.StaticLayer, "update", fail_at_the_last)
    else:
        monkeypatch.setattr(capture_mmmamba, "record", fail)
    output = model.generate(**padded(9), max_new_tokens=12, **OPTIONS)
    assert torch.equal(output.sequences, expected.sequences)
    assert {type(layer).__name__ for layer in output[CACHE].layers} <= ORDINARY


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"max_new_tokens": 3}, {"output_hidden_states": True}])
def test_what_a_recording_cannot_serve_runs_as_ever(model, replays, options):
    options = {"max_new_tokens": 12} | options
    expected = model.generate(**padded(9, 4), **options, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(**padded(9, 4), **options, **OPTIONS).sequences, expected.sequences)
    assert not replays


def recorded_and_plain(model, replays, make_inputs, tokens=10):
    """Both ways from inputs made twice, since a cache among them changes."""
    plain = model.generate(**make_inputs(), max_new_tokens=tokens, output_logits=True, disable_compile=True, **OPTIONS)
    recorded = model.generate(**make_inputs(), max_new_tokens=tokens, output_logits=True, **OPTIONS)
    assert len(replays) == tokens - 1
    assert torch.equal(recorded.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert recorded[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


def test_a_recording_has_room_for_embedded_prompts_and_continued_caches(model, replays):
    ids = token_ids(30, seed=4)[None].to(DEVICE)
    embed = model.get_input_embeddings()
    recorded_and_plain(model, replays, lambda: {"inputs_embeds": embed(ids).detach()})
    replays.clear()

    def continued():  # new tokens alone, with a mask of all
        with torch.no_grad():
            cache = model(ids[:, :20], use_cache=True)[CACHE]
        return {"input_ids": ids[:, 20:], "attention_mask": torch.ones_like(ids), CACHE: cache}

    recorded_and_plain(model, replays, continued)


def test_a_recording_keeps_positions_and_cut_caches(model, replays):
    ids = token_ids(20, seed=5)[None].to(DEVICE)
    positions = torch.arange(7, 27, device=DEVICE)[None]
    recorded_and_plain(model, replays, lambda: {"input_ids": ids, "position_ids": positions})
    if all(model.model.layers[i].layer_type == "full_attention" for i in range(len(model.model.layers))):
        replays.clear()

        def cut():
            with torch.no_grad():
                cache = model(ids, use_cache=True)[CACHE]
            cache.crop(-6)
            return {"input_ids": ids[:, :18], CACHE: cache}

        recorded_and_plain(model, replays, cut)


def test_keys_and_values_are_in_memory_once(model, replays):
    cache = model(token_ids(20, seed=3)[None].to(DEVICE), use_cache=True)[CACHE]
    grown = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    with torch.no_grad():
        step = RecordedStep(model, cache, None, 1, 64)
    assert all(layer.keys is None and layer.values is None and layer.buffers is None for layer in grown)
    step.release()
    assert all(layer.buffers[0].data_ptr() == layer.keys.data_ptr() and layer.keys.shape[2] == 20 for layer in grown)


def test_a_step_changes_nothing_until_it_is_called(model, replays):
    ids = token_ids(20, seed=3)[None].to(DEVICE)
    cache = model(ids, use_cache=True)[CACHE]
    with torch.no_grad():
        expected = model(ids[:, :1], **{CACHE: copy.deepcopy(cache)}).logits
        step = RecordedStep(model, cache, None, 1, 64)
        torch.testing.assert_close(step(ids[:, :1]), expected, rtol=1e-4, atol=1e-4)
    step.release()
    assert cache.get_seq_length() == 21


def test_warming_up_answers_and_says_how_long_it_took(model, replays, monkeypatch):
    monkeypatch.setattr(generation_mmmamba, "FEWEST_STEPS", 1)
    assert model.warm_up((1, 2), prompt_length=3) > 0
    assert len(replays) == 3 * 2  # one row; two rows, of one length and of two
