"""Whole layers' steps by the CPU kernels equal the modules', and are taken only where nothing stands in the way."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny_models import LAYER_TYPES, tiny_config, tiny_model, token_ids
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmmamba import cpu_mmmamba, layer_step_mmmamba, modeling_mmmamba
from mmmamba.backends_mmmamba import FEW_ROWS
from mmmamba.cache_mmmamba import CACHE, MmMambaCache
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.cpu_mmmamba import Kernels, kernels, usable_cores
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaMLP
from mmmamba.quantization_mmmamba import MmMambaQuantizationConfig
from mmmamba.ssm_mmmamba import ENVIRONMENT


PROMPT, STEPS = 6, 3
TEACHER, LINEAR, HYBRID = "teacher", "linear", "hybrid"
SHAPES = {
    "plain": {},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "odd sizes": {
        "hidden_size": 40, "head_dim": 24, "intermediate_size": 50, "num_attention_heads": 3,
        "num_key_value_heads": 1, "conv_kernel": 4,
    },
    "wide heads": {"head_dim": 80, "num_key_value_heads": 4, "conv_kernel": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if kernels() is None:
        pytest.skip(cpu_mmmamba.reason_without_kernels())


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Names of the kernels that were called for whole layers."""
    calls = []
    for name in ("layer_step", "attention_step"):
        called = getattr(Kernels, name)
        monkeypatch.setattr(Kernels, name, lambda *args, name=name, called=called: calls.append(name) or called(*args))
    return calls


@functools.cache
def _model(kind, shape):
    return tiny_model(kind, **SHAPES[shape]).float()


def new_model(kind=HYBRID, shape="plain"):
    return copy.deepcopy(_model(kind, shape))


def prompts(rows=1, length=PROMPT + STEPS):
    return torch.stack([token_ids(length, seed=seed) for seed in range(rows)])


def read(model, ids, prompt=PROMPT, cache=None, between=lambda cache: None, **kwargs):
    """Logits behind the prompt, its last token's and those of single tokens after it, and the cache."""
    with nullcontext() if kwargs.pop("gradients", False) else torch.no_grad():
        cache = model.new_cache() if cache is None else cache
        logits = [model(ids[:, :prompt], **{CACHE: cache}, **kwargs).logits[:, -1:]]
        between(cache)
        for position in range(prompt, ids.shape[1]):
            logits.append(model(ids[:, position : position + 1], **{CACHE: cache}, **kwargs).logits)
    return torch.cat(logits, dim=1), cache


def by_modules(function):
    """What `function` gives in plain torch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(ENVIRONMENT, "torch")
        return function()


def close(actual, expected):
    """Up to sums in another order, which the per-head norm of small states amplifies."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def compare(model, calls, rows=1, expected_calls=None, **kwargs):
    """Steps give what the modules give, and are the kernels' as often as expected; in all layers if not said."""
    ids = prompts(rows)
    expected = by_modules(lambda: read(model, ids, **kwargs)[0])
    assert not calls
    close(read(model, ids, **kwargs)[0], expected)
    layers = len(model.model.layers) if expected_calls is None else expected_calls
    assert len(calls) == layers * STEPS
    calls.clear()


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_steps_equal_the_modules(kind, shape, calls):
    for rows in (1, 2):
        compare(new_model(kind, shape), calls, rows)
    compare(new_model(kind, shape), calls, 17, expected_calls=0)  # more than the kernels are faster with


@pytest.mark.parametrize("dtype", FEW_ROWS, ids=str)
def test_steps_are_taken_up_to_the_rows_with_which_they_are_faster(dtype, calls):
    model, most = new_model().to(dtype), FEW_ROWS[dtype]
    layers = len(model.model.layers)
    for rows, expected_calls in ((most, layers * STEPS), (most + 1, 0)):
        read(model, prompts(rows))
        assert len(calls) == expected_calls
        calls.clear()


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_every_kind_of_layer_has_its_kernel(kind, calls):
    read(new_model(kind), prompts())
    names = {"linear_attention": "layer_step", "full_attention": "attention_step"}
    assert calls == [names[layer_type] for layer_type in LAYER_TYPES[kind]] * STEPS


def test_states_and_keys_after_steps_equal_the_modules():
    for kind in LAYER_TYPES:
        model = new_model(kind, "odd sizes")
        expected = by_modules(lambda: read(model, prompts(2))[1].tensors())  # noqa: B023
        actual = read(model, prompts(2))[1].tensors()
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            close(tensor, expected[name])


def test_models_of_text_alone_take_steps(calls):
    torch.manual_seed(0)
    text = tiny_config(TEACHER, num_embedding_layers=0).text_config
    config = MmMambaConfig(text_config=text, vision_config=None, image_token_id=None)
    compare(MmMambaForConditionalGeneration(config).eval().requires_grad_(False), calls)


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_bf16_is_no_coarser_than_the_modules(kind, calls):
    ids, model = prompts(2), new_model(kind, "odd sizes")
    truth = by_modules(lambda: read(copy.deepcopy(model).double(), ids)[0])[:, 1:]
    half = model.bfloat16()
    errors = [
        (logits[:, 1:].double() - truth).norm().item()
        for logits in (read(half, ids)[0], by_modules(lambda: read(half, ids)[0]))
    ]
    # Both read the prompt alike and round inputs and results of layers; the modules round between them, too. 1.1 is
    # for luck.
    assert errors[0] <= 1.1 * errors[1]
    assert len(calls) == len(half.model.layers) * STEPS


@pytest.mark.parametrize("length", [511, 512, 513, 1100])
def test_long_contexts_are_attended_to_in_segments(length, calls):
    for kind, rows in ((TEACHER, 1), (HYBRID, 2)):
        model, ids = new_model(kind), prompts(rows, length + 2)
        expected = by_modules(lambda: read(model, ids, length)[0])  # noqa: B023
        close(read(model, ids, length)[0], expected)
    assert calls.count("attention_step") == 2 * LAYER_TYPES[TEACHER].count("full_attention") + 2


def test_nan_in_a_key_of_the_past_is_not_lost():
    def spoil(cache):
        cache.layers[0].keys[0, 0, 2, 1] = torch.nan

    assert read(new_model(TEACHER), prompts(), between=spoil)[0][:, 1:].isnan().all()


# --- caches ----------------------------------------------------------------------------------------------------------


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def repeat_one(cache):
    cache.reorder_cache(torch.tensor([1, 1]))


def restore(cache):
    snapshot = cache.snapshot()
    read(new_model(), prompts(2)[:, :2], prompt=1, cache=cache)
    cache.restore(snapshot)


def use_a_clone(cache):
    cache.__dict__.update(cache.clone().__dict__)


@pytest.mark.parametrize("change", [reorder, repeat_one, restore, use_a_clone])
def test_steps_go_on_after_rows_were_moved_or_tokens_forgotten(change, calls):
    model, ids = new_model(), prompts(2)
    expected = by_modules(lambda: read(model, ids, between=change)[0])
    close(read(model, ids, between=change)[0], expected)
    assert len(calls) >= 4 * STEPS


def test_steps_go_on_after_a_crop_and_after_beams_were_made(calls):
    model, ids = new_model(TEACHER), prompts()
    expected = by_modules(lambda: read(model, ids, between=lambda cache: cache.crop(-2))[0])
    close(read(model, ids, between=lambda cache: cache.crop(-2))[0], expected)
    model = new_model()
    with torch.no_grad():

        def beams():
            _, cache = read(model, ids, prompt=ids.shape[1])
            cache.repeat_rows(2)
            return model(ids[:, :2].T, **{CACHE: cache}).logits

        expected = by_modules(beams)
        calls.clear()
        close(beams(), expected)
    assert len(calls) == 4


def test_transformers_own_caches_are_stepped_through(calls):
    for kind in LAYER_TYPES:
        model = new_model(kind)
        expected = by_modules(lambda: read(model, prompts())[0])  # noqa: B023
        close(read(model, prompts(), cache=DynamicCache(config=model.config))[0], expected)
        assert len(calls) == 4 * STEPS
        calls.clear()


@pytest.mark.parametrize("capacity", [PROMPT + STEPS, 20])
def test_keys_of_fixed_length_are_not_attended_to_where_nothing_was_read(capacity, calls):
    for kind, make in (
        (HYBRID, lambda config: MmMambaCache(config, max_cache_len=capacity)),
        (TEACHER, lambda config: StaticCache(config=config.text_config, max_cache_len=capacity)),
    ):
        model = new_model(kind)
        expected = by_modules(lambda: read(model, prompts())[0])  # noqa: B023
        close(read(model, prompts(), cache=make(model.config))[0], expected)
    full = LAYER_TYPES[TEACHER].count("full_attention") + 1 if capacity == PROMPT + STEPS else 0
    assert calls.count("attention_step") <= full  # where all places are filled there may be no mask
    assert calls.count("layer_step") == LAYER_TYPES[HYBRID].count("linear_attention") * STEPS


def test_generated_tokens_are_those_of_the_modules(calls):
    model, ids = new_model(), prompts()
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        expected = by_modules(lambda: model.generate(ids, **options))  # noqa: B023
        assert torch.equal(model.generate(ids, **options), expected)
        assert len(calls) >= 4 * 4
        calls.clear()


@torch.no_grad()
def test_inputs_and_caches_of_other_sizes_are_the_modules_errors(calls):
    model = new_model()
    _, cache = read(model, prompts())
    calls.clear()
    with pytest.raises(RuntimeError):
        model(inputs_embeds=torch.randn(1, 1, 24), **{CACHE: cache})
    with pytest.raises((RuntimeError, ValueError)):
        model(prompts(2)[:, :1], **{CACHE: cache})
    _, other = read(new_model(HYBRID, "odd sizes"), prompts())
    calls.clear()
    with pytest.raises((RuntimeError, ValueError)):
        model(prompts()[:, :1], **{CACHE: other})
    assert not calls


# --- where the modules run -------------------------------------------------------------------------------------------


PLACES = [
    "input_layernorm", "post_attention_layernorm",
    "mlp", "mlp.act_fn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "mamba", "mamba.in_proj", "mamba.conv1d", "mamba.norm", "mamba.out_proj",
    "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
]  # fmt: skip


def doubled(output):
    return tuple(2 * x for x in output) if isinstance(output, tuple) else 2 * output


def add_hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, output: doubled(output))


def add_hook_before(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def replace_forward(parent, name):
    module, forward = getattr(parent, name), getattr(parent, name).forward
    module.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))


def replace_module(parent, name):
    class Other(type(getattr(parent, name))):
        def forward(self, *args, **kwargs):
            return doubled(super().forward(*args, **kwargs))

    getattr(parent, name).__class__ = Other


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_with_a_part_that_is_hooked_or_replaced_runs_its_modules(place, calls):
    parent, _, name = place.rpartition(".")
    index = LAYER_TYPES[HYBRID].index("full_attention" if "self_attn" in place else "linear_attention")
    for change in (add_hook, add_hook_before, replace_forward, replace_module):
        model = new_model()
        read(model, prompts())  # what is remembered of it must not outlive the change
        calls.clear()
        change(model.model.layers[index].get_submodule(parent), name)
        compare(model, calls, expected_calls=3)


def test_a_class_with_another_forward_runs_as_it_is(calls, monkeypatch):
    forward = MmMambaMLP.forward
    monkeypatch.setattr(MmMambaMLP, "forward", lambda self, x: 2 * forward(self, x))
    compare(new_model(), calls, expected_calls=0)


def test_another_activation_runs_as_it_is(calls):
    model = new_model()
    compare(model, calls)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    compare(model, calls, expected_calls=3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of PEFT
def test_adapters_take_effect(calls):
    peft = pytest.importorskip("peft", reason="pip install -e '.[finetune]'")
    model = new_model()
    compare(model, calls)
    config = peft.LoraConfig(target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    compare(adapted.base_model.model, calls, expected_calls=0)
    compare(adapted.merge_and_unload(), calls)


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_padding_is_masked_and_a_mask_of_ones_is_none(kind, calls):
    model, ids, mask = new_model(kind), prompts(2), torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[0, :2] = 0

    @torch.no_grad()
    def steps(mask):
        cache, logits = model.new_cache(), []
        for start, stop in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))):
            logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache}).logits[:, -1])
        return torch.stack(logits)

    close(steps(mask), by_modules(lambda: steps(mask)))
    assert calls.count("attention_step") == 0
    calls.clear()
    close(steps(torch.ones_like(mask)), by_modules(lambda: steps(torch.ones_like(mask))))
    assert len(calls) == 4 * STEPS


def test_gradients_autocast_training_and_other_dtypes_run_the_modules(calls):
    model = new_model()
    compare(model, calls, expected_calls=0, gradients=True)
    with torch.autocast("cpu", torch.bfloat16):
        ids = prompts()
        expected = by_modules(lambda: read(model, ids)[0])
        torch.testing.assert_close(read(model, ids)[0], expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert not calls
    compare(model.train(), calls, expected_calls=0, use_cache=True)
    compare(model.eval().double(), calls, expected_calls=0)
    half = model.half()
    torch.testing.assert_close(read(half, ids)[0], by_modules(lambda: read(half, ids)[0]), rtol=1e-2, atol=1e-2)
    assert not calls


def test_weights_of_attention_are_given_where_they_are_asked_for(calls):
    model = new_model(TEACHER)
    model.set_attn_implementation("eager")
    compare(model, calls, expected_calls=0)
    with torch.no_grad():
        _, cache = read(model, prompts())
        attentions = model(prompts()[:, :1], output_attentions=True, **{CACHE: cache}).attentions
    assert all(weights.shape == (1, 4, 1, PROMPT + STEPS + 1) for weights in attentions)
    model = new_model(HYBRID)
    model.set_attn_implementation("eager")
    compare(model, calls, expected_calls=3)
    model.set_attn_implementation("sdpa")  # it has none to give: one None for each layer
    compare(model, calls, expected_calls=3, output_attentions=True)


def test_an_attention_function_of_the_users_own_is_called(calls, monkeypatch):
    torch_attention, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def own(*args, **kwargs):
        seen.append(1)
        return torch_attention(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        compare(new_model(), calls, expected_calls=3)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert seen
    compare(new_model(), calls)


@torch.no_grad()
def test_compiled_graphs_hold_no_kernels(calls):
    model, ids = new_model(), prompts()
    expected, _ = read(model, ids)
    calls.clear()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    _, cache = read(model, ids, prompt=ids.shape[1] - 1)
    calls.clear()
    _, cache = read(model, ids[:, :-1], prompt=ids.shape[1] - 1)
    assert not calls
    torch.testing.assert_close(
        compiled(ids[:, -1:], **{CACHE: cache}).logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4
    )
    assert not calls


# --- changes to a model ----------------------------------------------------------------------------------------------


def in_place(layer):
    for parameter in layer.parameters():
        parameter.mul_(1.5)


def load(layer):
    layer.load_state_dict({name: 1.5 * x for name, x in layer.state_dict().items()})


def load_other_tensors(layer):
    layer.load_state_dict({name: 1.5 * x for name, x in layer.state_dict().items()}, assign=True)


def replace_data(layer):
    for parameter in layer.parameters():
        parameter.data = 1.5 * parameter.data


def cast_there_and_back(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def replace_linear(layer):
    layer.mlp.up_proj = nn.Linear(32, 48, bias=True).requires_grad_(False)


def transpose_in_place(layer):
    """The same address, shape and parameter."""
    place = layer.mamba.out_proj if hasattr(layer, "mamba") else layer.self_attn.o_proj
    place.weight.data = place.weight.data.t()


def narrow(layer):
    """A pruned MLP; the same addresses."""
    down = layer.mlp.down_proj
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.data, linear.out_features = linear.weight.data[:40], 40
    place, kept = down.weight.data.view(-1), down.weight.data[:, :40].clone()
    place[: kept.numel()] = kept.view(-1)
    down.weight.data, down.in_features = place[: kept.numel()].view_as(kept), 40


def change_eps(layer):
    layer.post_attention_layernorm.eps = 1.0


def share_weights(layer):
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight


def change_scaling(layer):
    if hasattr(layer, "self_attn"):
        layer.self_attn.scaling = 1.0


@pytest.mark.parametrize(
    ("change", "seen_by_kernels"),
    [
        (in_place, 4), (load, 4), (load_other_tensors, 4), (replace_data, 4), (cast_there_and_back, 4),
        (replace_linear, 4), (transpose_in_place, 0), (narrow, 4), (change_eps, 4), (share_weights, 4),
        (change_scaling, 3),
    ],
)  # fmt: skip
@torch.no_grad()
def test_changed_weights_count_in_the_next_step(change, seen_by_kernels, calls):
    model, ids = new_model(), prompts()
    _, cache = read(model, ids)
    calls.clear()
    before = model(ids[:, :1], **{CACHE: cache.clone()}).logits
    for layer in model.model.layers:
        change(layer)
    actual, expected = (
        model(ids[:, :1], **{CACHE: cache.clone()}).logits,
        by_modules(lambda: model(ids[:, :1], **{CACHE: cache.clone()}).logits),
    )
    close(actual, expected)
    assert not torch.allclose(actual, before, rtol=1e-4)
    assert len(calls) == 4 + seen_by_kernels


def test_copies_and_pickles_of_a_model_take_steps_of_their_own(calls):
    model, ids = new_model(), prompts()
    expected, _ = read(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(read(other, ids)[0], expected)
        assert len(calls) == 4 * STEPS
        assert torch.equal(read(model, ids)[0], expected)


def test_plans_keep_no_model_in_memory():
    gc.collect()
    before, model = len(layer_step_mmmamba._plans), new_model()
    read(model, prompts())
    assert len(layer_step_mmmamba._plans) == before + 4
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert len(layer_step_mmmamba._plans) == before


# --- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_of_python_read_two_texts():
    model, ids = new_model(), prompts(2, 100)
    expected = [read(model, row[None])[0] for row in ids]
    results, barrier = [None, None], threading.Barrier(2)

    def run(index):
        barrier.wait()
        results[index] = [read(model, ids[index : index + 1])[0] for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for truth, given in zip(expected, results, strict=True):
        assert all(torch.equal(logits, truth) for logits in given)


def test_one_thread_and_two_give_the_same_bits(monkeypatch):
    ids, before = prompts(2, 530), torch.get_num_threads()
    _, cache = read(new_model(), ids, prompt=530)
    kernels().set_most_threads(2)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(read(new_model(), ids[:, :4], prompt=1, cache=cache.clone())[0])
    finally:
        torch.set_num_threads(before)
        kernels().set_most_threads(usable_cores())
    assert torch.equal(results[0][:, 1:], results[1][:, 1:])


# --- quantised layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_take_steps_of_more_rows(bits, calls, monkeypatch):
    sizes = {"hidden_size": 64, "head_dim": 24, "intermediate_size": 96, "num_embedding_layers": 2, "mlp_bias": True}
    model = tiny_model(HYBRID, **sizes).float()
    model.quantize_weights(MmMambaQuantizationConfig(bits=bits))
    for rows, taken in ((1, 4), (2, 4), (5, 4), (16, 4), (17, 0)):
        with monkeypatch.context() as patch:
            # The reference multiplies by the same kernels, so that inputs are rounded alike.
            patch.setattr(modeling_mmmamba, "layer_step", lambda *args: None)
            expected, _ = read(model, prompts(rows))
        actual, _ = read(model, prompts(rows))
        # An input that is nearly halfway between two integers may be rounded to the other one.
        assert (actual - expected).norm() < 0.01 * expected.norm()
        assert len(calls) == taken * STEPS
        calls.clear()


def test_layers_of_which_some_are_quantised_take_steps(calls, monkeypatch):
    model = tiny_model(HYBRID, hidden_size=64, intermediate_size=100).float()
    model.quantize_weights(MmMambaQuantizationConfig(bits=8, modules_to_not_convert=["out_proj", "q_proj"]))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear  # 100 inputs are no whole groups
    with monkeypatch.context() as patch:
        patch.setattr(modeling_mmmamba, "layer_step", lambda *args: None)
        expected, _ = read(model, prompts(2))
    assert (read(model, prompts(2))[0] - expected).norm() < 0.01 * expected.norm()
    assert len(calls) == 4 * STEPS


def test_weights_of_other_classes_are_not_read_around(calls):
    """As quantisation tools have them."""

    class Quantised(torch.Tensor):
        pass

    model = new_model()
    compare(model, calls)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    compare(model, calls, expected_calls=0)  # what it gives is of this class, too
