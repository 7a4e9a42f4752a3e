"""What a model has read: kept exactly, shared with Transformers' own caches, and refused where it cannot be."""

import copy

import pytest
import torch
from tiny_models import LAYER_TYPES, tiny_model, token_ids
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from mmmamba.cache_mmmamba import CACHE, MmMambaCache, MmMambaKeyValueLayer


IDS = token_ids(12, seed=3)[None]
MORE = token_ids(5, seed=4)[None]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_accepted(model, name):
    expected = model(torch.cat([IDS, MORE], 1)).logits[:, 12:]
    for read in (model, model.model):
        cache = model.new_cache()
        read(IDS, **{name: cache})
        close(model(MORE, **{name: cache}).logits, expected)


@pytest.mark.parametrize("make", [lambda config: DynamicCache(config=config), lambda config: DynamicCache()])
def test_a_stock_cache_is_filled_and_read(model, make):
    cache = make(model.config)
    output = model(IDS, **{CACHE: cache})
    assert getattr(output, CACHE) is cache
    close(model(MORE, **{CACHE: cache}).logits, model(torch.cat([IDS, MORE], 1)).logits[:, 12:])


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_a_stock_static_cache_is_filled_and_read(kind):
    model = tiny_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(IDS, **{CACHE: cache})
    expected = model(torch.cat([IDS, MORE], 1)).logits
    close(model(MORE[:, :4], **{CACHE: cache}).logits, expected[:, 12:16])
    close(model(MORE[:, 4:], **{CACHE: cache}).logits, expected[:, 16:])


def test_generate_takes_a_stock_cache_or_says_why_not(model):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    cache = DynamicCache(config=model.config)
    if "full_attention" in model.config.text_config.layer_types:
        expected = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, **{CACHE: cache}, **options), expected)
        assert cache.get_seq_length() == 15
    else:
        with pytest.raises(ValueError, match="does not count tokens where no layer is attention"):
            model.generate(IDS, **{CACHE: cache}, **options)


def test_caches_of_other_models_are_refused_in_words():
    model = tiny_model("hybrid")
    for cache, words in (
        (DynamicCache(config=tiny_model("teacher").config), "in another order or number"),
        (MmMambaCache(tiny_model("linear").config), "in another order or number"),
        (((torch.zeros(1), torch.zeros(1)),), "A tuple cannot be this model's cache"),
    ):
        with pytest.raises(ValueError, match=words):
            model(IDS, **{CACHE: cache})
    with pytest.raises(ValueError, match="has not got"):
        MmMambaCache(tiny_model("linear").config, offloading=True)


def test_the_configs_use_cache_is_honoured(model):
    config = model.config.text_config
    assert isinstance(getattr(model(IDS), CACHE), MmMambaCache)
    assert getattr(model(IDS, use_cache=False), CACHE) is None
    config.use_cache = False
    try:
        assert getattr(model(IDS), CACHE) is None
        assert isinstance(getattr(model(IDS, use_cache=True), CACHE), MmMambaCache)
    finally:
        config.use_cache = True
    assert getattr(copy.deepcopy(model).train()(IDS), CACHE) is None


def test_what_was_read_in_inference_mode_goes_on_outside(model):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    cache = model.new_cache()
    with torch.inference_mode():
        model(IDS, **{CACHE: cache})
    whole = torch.cat([IDS, MORE], 1)
    assert torch.equal(model.generate(whole, **{CACHE: cache}, **options), model.generate(whole, **options))


@pytest.mark.parametrize("frozen", [(), ("k_proj", "v_proj"), ("k_proj", "in_proj", "conv1d", "A_log", "dt_bias")])
@pytest.mark.parametrize("kind", list(LAYER_TYPES))
def test_gradients_through_a_cache_are_those_of_the_whole(kind, frozen):
    """Also where keys need no gradient and queries do, so that autograd has saved keys that grow afterwards."""
    model = tiny_model(kind).train().requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    model.model.embed_tokens.requires_grad_(False)
    whole, gradients = torch.cat([IDS, MORE, MORE], 1), []
    for pieces in ((whole,), (IDS, MORE, MORE)):
        model.zero_grad()
        cache, logits = model.new_cache(), []
        for piece in pieces:
            logits.append(model(piece, **{CACHE: cache}).logits)
        torch.cat(logits, 1).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_keys_and_values_grow_in_place_whatever_others_do_to_them():
    """As Transformers' own layer over random updates, with cropping, reordering and a copy in between."""
    torch.manual_seed(0)
    layers, copies, places = [MmMambaKeyValueLayer(), DynamicLayer()], [], set()
    for step in range(60):
        new = torch.randn(2, 2, 3, 1 + 40 * (step % 7 == 0), 4)
        (keys, values), (expected_keys, expected_values) = (layer.update(*new) for layer in layers)
        assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
        places.add(keys.data_ptr())
        if step == 20:
            copies = [copy.deepcopy(layer) for layer in layers]
        for layer in layers:
            if step == 30:
                layer.keys, layer.values = layer.keys[:, :, :-9], layer.values[:, :, :-9]
            if step == 40:
                layer.reorder_cache(torch.tensor([1, 0]))
    assert len(places) < 12
    assert all(torch.equal(*pair) for pair in zip(*(layer.update(*new) for layer in copies), strict=True))


@torch.no_grad()
def test_what_was_read_since_a_snapshot_is_forgotten(model):
    cache = model.new_cache()
    empty = cache.snapshot()
    model(IDS, **{CACHE: cache})
    expected, snapshot = cache.clone(), cache.snapshot()
    model(MORE, **{CACHE: cache})
    cache.restore(snapshot)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(cache.tensors(), expected.tensors(), rtol=0, atol=0)
    close(model(MORE, **{CACHE: cache}).logits, model(MORE, **{CACHE: expected}).logits)
    cache.restore(empty)
    assert cache.get_seq_length() == 0 and cache.tensors() == {}


@torch.no_grad()
def test_only_a_cache_without_states_can_be_cropped(model):
    cache = model.new_cache()
    model(torch.cat([IDS, MORE], 1), **{CACHE: cache})
    if cache.state_layers:
        with pytest.raises(ValueError, match="cannot forget"):
            cache.crop(-5)
    else:
        cache.crop(-5)
        assert cache.get_seq_length() == 12
        close(model(MORE, **{CACHE: cache}).logits, model(torch.cat([IDS, MORE], 1)).logits[:, 12:])
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)


@torch.no_grad()
def test_a_reset_cache_is_as_new(model):
    cache = model.new_cache()
    with torch.inference_mode():
        model(IDS, **{CACHE: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(MORE, **{CACHE: cache}).logits, model(MORE).logits)
