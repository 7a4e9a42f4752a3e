"""Recorded decoding steps. Without a GPU, a stand-in for a CUDA graph repeats the same work on the same tensors."""

import copy

import pytest
import torch
from tiny_models import LAYER_TYPES, tiny_model, token_ids
from transformers.cache_utils import DynamicLayer

from mmmamba import attention_mmmamba, capture_mmmamba
from mmmamba.capture_mmmamba import Step


ORDINARY = {"MmMambaKeyValueLayer", "LinearAttentionLayer"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True}


@pytest.fixture
def replays(monkeypatch):
    """Counts replays; on a CPU, records by keeping the function and its first result."""
    count = []
    record = capture_mmmamba.record

    def stand_in(run, undo):
        result = run().clone()
        undo()
        return lambda: result.copy_(run()), result

    def counting(run, undo):
        replay, result = (record if DEVICE == "cuda" else stand_in)(run, undo)
        return lambda: (count.append(1), replay()), result

    monkeypatch.setattr(capture_mmmamba, "record", counting)
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_mmmamba, "SPLITS", 2)  # one after the other in the interpreter
        monkeypatch.setattr(capture_mmmamba, "recordable", lambda model, cache: cache is not None)
    return count


@pytest.fixture(scope="module", params=list(LAYER_TYPES))
def model(request):
    return tiny_model(request.param).float().to(DEVICE)


def padded(*lengths):
    ids = [token_ids(length, seed=length) for length in lengths]
    longest = max(lengths)
    rows = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=2) for row in ids])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": rows.to(DEVICE), "attention_mask": mask.to(DEVICE)}


@pytest.mark.parametrize("lengths", [(7,), (40, 3), (5, 5, 70)], ids=["one", "padded", "long"])
def test_recorded_steps_say_what_plain_ones_say(model, replays, lengths):
    inputs = padded(*lengths)
    plain = model.generate(**inputs, max_new_tokens=20, output_logits=True, disable_compile=True, **OPTIONS)
    assert not replays
    recorded = model.generate(**inputs, max_new_tokens=20, output_logits=True, **OPTIONS)
    assert len(replays) == 19
    assert torch.equal(recorded.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


def test_the_cache_is_an_ordinary_one_afterwards(model, replays):
    inputs = padded(12)
    caches = [
        model.generate(**inputs, max_new_tokens=10, disable_compile=plain, **OPTIONS).past_key_values
        for plain in (True, False)
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
    logits = [model(more, past_key_values=copy.deepcopy(cache)).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_answer_leaves_an_ordinary_cache(model, replays):
    cache = model.new_cache()

    class Interrupting:
        def put(self, value):
            if len(replays) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**padded(12), past_key_values=cache, max_new_tokens=20, streamer=Interrupting(), **OPTIONS)
    assert cache.get_seq_length() == 15
    assert {type(layer).__name__ for layer in cache.layers} <= ORDINARY


def test_where_recording_fails_steps_run_as_ever(model, replays, monkeypatch):
    expected = model.generate(**padded(9), max_new_tokens=12, disable_compile=True, **OPTIONS)

    def fail(run, undo):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture_mmmamba, "record", fail)
    output = model.generate(**padded(9), max_new_tokens=12, **OPTIONS)
    assert torch.equal(output.sequences, expected.sequences)
    assert {type(layer).__name__ for layer in output.past_key_values.layers} <= ORDINARY


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"max_new_tokens": 3}, {"output_hidden_states": True}])
def test_what_a_recording_cannot_serve_runs_as_ever(model, replays, options):
    options = {"max_new_tokens": 12} | options
    expected = model.generate(**padded(9, 4), **options, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(**padded(9, 4), **options, **OPTIONS).sequences, expected.sequences)
    assert not replays


def test_a_step_changes_nothing_until_it_is_called(model, replays):
    ids = token_ids(20, seed=3)[None].to(DEVICE)
    cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        step = Step(model, cache, None, 1, 64)
        torch.testing.assert_close(step(ids[:, :1]), expected, rtol=1e-4, atol=1e-4)
    step.release()
    assert cache.get_seq_length() == 21


def test_warming_up_answers_and_says_how_long_it_took(model, replays, caplog):
    assert model.warm_up((1, 2), prompt_length=9) > 0
    assert len(replays) == 2 * (capture_mmmamba.FEWEST_STEPS + 1)
