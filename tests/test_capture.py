"""Recorded decoding steps equal eager ones. Without a GPU, a stand-in for the CUDA graph reruns the step."""

import copy
import logging

import pytest
import torch
from tiny_models import tiny_model, token_ids
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from mmmamba import attention_mmmamba, cache_mmmamba, capture_mmmamba, generation_mmmamba
from mmmamba.cache_mmmamba import CACHE
from mmmamba.capture_mmmamba import RecordedStep


ORDINARY_LAYERS = {"MmMambaKeyValueLayer", "LinearAttentionLayer"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True}


@pytest.fixture
def replays(monkeypatch):
    """A list with an entry for every replay; on a CPU, a replay reruns the function and copies its result."""
    replayed = []
    record = capture_mmmamba.record

    def stand_in(run, undo, device):
        result = run().clone()
        undo()
        return lambda: result.copy_(run()), result

    def counting_record(*arguments):
        replay, result = (record if DEVICE == "cuda" else stand_in)(*arguments)
        return lambda: (replayed.append(1), replay()), result

    monkeypatch.setattr(capture_mmmamba, "record", counting_record)
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_mmmamba, "SPLITS", 2)  # the interpreter runs them one after the other
        monkeypatch.setattr(generation_mmmamba, "recordable", lambda model, cache: cache is not None)
    return replayed


LAYER_TYPES = {  # few: Triton's interpreter takes a second for ten steps of one attention layer
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
def test_recorded_steps_give_the_tokens_and_logits_of_eager_ones(model, replays, lengths):
    inputs = padded(*lengths)
    eager = model.generate(**inputs, max_new_tokens=12, output_logits=True, disable_compile=True, **OPTIONS)
    assert not replays
    recorded = model.generate(**inputs, max_new_tokens=12, output_logits=True, **OPTIONS)
    assert len(replays) == 11
    assert torch.equal(recorded.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(eager.logits), rtol=1e-4, atol=1e-4)


def test_after_recorded_steps_the_cache_is_ordinary_and_equals_an_eager_one(model, replays):
    inputs = padded(12)
    caches = [
        model.generate(**inputs, max_new_tokens=10, disable_compile=eager, **OPTIONS)[CACHE] for eager in (True, False)
    ]
    assert len(replays) == 9
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 21
    for expected, layer in zip(*(cache.layers for cache in caches), strict=True):
        assert type(layer) is type(expected)
    torch.testing.assert_close(*(cache.tensors() for cache in caches), rtol=1e-4, atol=1e-4)
    more = token_ids(5, seed=9)[None].to(DEVICE)
    logits = [model(more, **{CACHE: copy.deepcopy(cache)}).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_generate_leaves_an_ordinary_cache(model, replays):
    cache = model.new_cache()

    class Interrupting:
        def put(self, value):
            if len(replays) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**padded(12), **{CACHE: cache}, max_new_tokens=20, streamer=Interrupting(), **OPTIONS)
    assert cache.get_seq_length() == 15
    assert {type(layer).__name__ for layer in cache.layers} <= ORDINARY_LAYERS


@pytest.fixture
def logged(caplog):
    """`caplog`, which Transformers' messages reach only where they are propagated: by default where CI is set."""
    transformers_logging.warning_once.cache_clear()  # said once for each test, not for each process
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


@pytest.mark.parametrize("moment", ["before", "during", "after", "fixing the length"])
@pytest.mark.parametrize("kind", [RuntimeError, ImportError, Exception])  # Triton's own errors derive from Exception
def test_if_recording_fails_steps_run_eagerly(model, replays, monkeypatch, moment, kind, logged):
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
        if len(layers := [*fixed, layer]) == len(attention_layers):
            broken()
        fixed[:] = layers
        return update(layer, *arguments)

    attention_layers = [kind for kind in model.config.text_config.layer_types if kind == "full_attention"]
    fixed = []
    if moment == "fixing the length":
        monkeypatch.setattr(cache_mmmamba.StaticLayer, "update", fail_at_the_last)
    else:
        monkeypatch.setattr(capture_mmmamba, "record", fail)
    output = model.generate(**padded(9), max_new_tokens=12, **OPTIONS)
    if moment != "fixing the length" or attention_layers:
        assert "a step could not be recorded (operation not permitted when stream is capturing)" in logged.text
    assert torch.equal(output.sequences, expected.sequences)
    assert {type(layer).__name__ for layer in output[CACHE].layers} <= ORDINARY_LAYERS


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"max_new_tokens": 3}, {"output_hidden_states": True}])
def test_beams_short_answers_and_hidden_states_run_eagerly(model, replays, options):
    options = {"max_new_tokens": 12} | options
    expected = model.generate(**padded(9, 4), **options, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(**padded(9, 4), **options, **OPTIONS).sequences, expected.sequences)
    assert not replays


def assert_recorded_equals_eager(model, replays, make_inputs, tokens=10):
    """Generates eagerly and recorded; inputs are made for each, since a cache among them changes."""
    eager = model.generate(**make_inputs(), max_new_tokens=tokens, output_logits=True, disable_compile=True, **OPTIONS)
    recorded = model.generate(**make_inputs(), max_new_tokens=tokens, output_logits=True, **OPTIONS)
    assert len(replays) == tokens - 1
    assert torch.equal(recorded.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(recorded.logits), torch.stack(eager.logits), rtol=1e-4, atol=1e-4)
    assert recorded[CACHE].get_seq_length() == eager[CACHE].get_seq_length()


def test_recorded_steps_continue_embedded_prompts_and_given_caches(model, replays):
    ids = token_ids(30, seed=4)[None].to(DEVICE)
    embed = model.get_input_embeddings()
    assert_recorded_equals_eager(model, replays, lambda: {"inputs_embeds": embed(ids).detach()})
    replays.clear()

    def continued():  # ids of the new tokens, mask of all tokens
        with torch.no_grad():
            cache = model(ids[:, :20], use_cache=True)[CACHE]
        return {"input_ids": ids[:, 20:], "attention_mask": torch.ones_like(ids), CACHE: cache}

    assert_recorded_equals_eager(model, replays, continued)


def test_recorded_steps_continue_given_positions_and_cropped_caches(model, replays):
    ids = token_ids(20, seed=5)[None].to(DEVICE)
    positions = torch.arange(7, 27, device=DEVICE)[None]
    assert_recorded_equals_eager(model, replays, lambda: {"input_ids": ids, "position_ids": positions})
    if all(model.model.layers[i].layer_type == "full_attention" for i in range(len(model.model.layers))):
        replays.clear()

        def cropped():
            with torch.no_grad():
                cache = model(ids, use_cache=True)[CACHE]
            cache.crop(-6)
            return {"input_ids": ids[:, :18], CACHE: cache}

        assert_recorded_equals_eager(model, replays, cropped)


def test_a_recording_holds_keys_and_values_in_memory_once(model, replays):
    cache = model(token_ids(20, seed=3)[None].to(DEVICE), use_cache=True)[CACHE]
    attention_layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    with torch.no_grad():
        step = RecordedStep(model, cache, None, 1, 64)
    assert all(layer.keys is None and layer.values is None and layer.buffers is None for layer in attention_layers)
    step.release()
    assert all(
        layer.buffers[0].data_ptr() == layer.keys.data_ptr() and layer.keys.shape[2] == 20
        for layer in attention_layers
    )


def test_recording_a_step_does_not_change_the_cache(model, replays):
    ids = token_ids(20, seed=3)[None].to(DEVICE)
    cache = model(ids, use_cache=True)[CACHE]
    with torch.no_grad():
        expected = model(ids[:, :1], **{CACHE: copy.deepcopy(cache)}).logits
        step = RecordedStep(model, cache, None, 1, 64)
        torch.testing.assert_close(step(ids[:, :1]), expected, rtol=1e-4, atol=1e-4)
    step.release()
    assert cache.get_seq_length() == 21


def test_warm_up_records_and_returns_the_seconds_it_took(model, replays, monkeypatch):
    monkeypatch.setattr(generation_mmmamba, "FEWEST_STEPS", 1)
    assert model.warm_up((1, 2), prompt_length=3) > 0
    assert len(replays) == 3 * 2  # one row; two rows, of one length and of two
