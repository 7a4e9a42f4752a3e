"""Our Triton kernels against the reference in fp64: on a GPU, or in Triton's interpreter where there is none."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from large_steps import LARGE, largest_errors
from tiny_models import tiny_model, token_ids

from mmmamba.backends_mmmamba import find
from mmmamba.cache_mmmamba import CACHE
from mmmamba.ssm_mmmamba import TORCH, Sequences, decode_step


TRITON, reason = find("triton")
if TRITON is None:
    pytest.skip(f"triton {reason}", allow_module_level=True)
from mmmamba import attention_mmmamba, triton_mmmamba  # noqa: E402
from mmmamba.attention_mmmamba import attend  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative errors: some roundings of each dtype's unit (6e-8, 5e-4, 4e-3), which an error in the maths exceeds by far.
ERRORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
dtypes = st.sampled_from(list(ERRORS))
layouts = st.one_of(
    st.tuples(st.just("rows"), st.integers(1, 2), st.integers(1, 140)),
    st.tuples(st.just("packed"), st.lists(st.integers(1, 140), min_size=2, max_size=3)),
    st.tuples(st.just("padded"), st.lists(st.integers(0, 140), min_size=2, max_size=2).filter(any), st.booleans()),
)


def random_shapes(examples):
    """Random shapes, the same on every run; a failing one is shown as it is, since the interpreter is slow.

    A GPU has every kernel compiled anew for every size: there are fewer of them there.
    """
    examples = examples if DEVICE == "cpu" else examples // 4
    return settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate])


def laid_out(layout) -> tuple[int, int, int, Sequences | None]:
    """Rows and length that a backend sees, the number of states, and what belongs together."""
    kind, *rest = layout
    if kind == "rows":
        return *rest, rest[0], None
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in rest[0]])[None]
        return 1, positions.shape[1], len(rest[0]), Sequences.from_position_ids(positions.to(DEVICE))
    lengths, left = rest
    steps = torch.arange(max(lengths) + 1)  # a column at least is padding
    mask = torch.stack([steps >= len(steps) - length if left else steps < length for length in lengths])
    return 1, sum(lengths), len(lengths), Sequences.from_mask(mask.to(DEVICE))


def results(run, inputs, upstream) -> list[torch.Tensor]:
    """Outputs, and with `upstream` the gradient of every input."""
    leaves = [x.clone().requires_grad_(upstream is not None) for x in inputs]
    outputs = list(run(*leaves))
    if upstream is None:
        return outputs
    sum((y.double() * up).sum() for y, up in zip(outputs, upstream, strict=True)).backward()
    assert all(x.grad is not None for x in leaves)
    return [*(y.detach() for y in outputs), *(x.grad for x in leaves)]


def agree(ours, reference, inputs, dtype, differentiable=True, exact=()):
    """Outputs and every gradient are as near to the reference in fp64 as roundings in `dtype` explain.

    Sums may cancel: what the reference itself loses in `dtype` is allowed for, and what it loses when its inputs move
    by one rounding, since a single sum may lose nothing by luck. Inputs numbered `exact` stay in fp32.
    """
    low = [x.to(DEVICE, torch.float32 if i in exact else dtype) for i, x in enumerate(inputs)]
    high = [x.double() for x in low]
    upstream = [torch.randn_like(y) for y in reference(*(x.clone() for x in high))] if differentiable else None
    values, truths = results(ours, low, upstream), results(reference, high, upstream)
    rounded = [results(reference, low, upstream)]
    for _ in range(3):
        moved = [x * (1 + torch.finfo(y.dtype).eps / 2 * torch.randn_like(x)) for x, y in zip(high, low, strict=True)]
        rounded.append(results(reference, moved, upstream))
    for index, (value, truth, *near) in enumerate(zip(values, truths, *rounded, strict=True)):
        lost = max((x.double() - truth).norm() for x in near)
        allowed = ERRORS[dtype] * (truth.norm() + 0.01 * truth.numel() ** 0.5) + 4 * lost
        assert (value.double() - truth).norm() <= allowed, f"output or gradient {index}"


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@random_shapes(24)
@given(
    layouts, st.sampled_from([(1, 1), (1, 3), (2, 2)]), st.integers(2, 40), st.integers(2, 40), dtypes, st.booleans()
)
def test_scan_and_every_gradient(layout, heads_of, head_dim, state_size, dtype, with_state):
    torch.manual_seed(0)
    rows, length, states, sequences = laid_out(layout)
    kv_heads, group = heads_of
    heads = kv_heads * group
    inputs = [
        random(rows, length, kv_heads, head_dim),
        random(rows, length, kv_heads, state_size),
        random(rows, length, heads, state_size),
        F.softplus(random(rows, length, heads) - 2),
        -2 * torch.rand(heads, dtype=torch.float64),
        random(states, heads, head_dim, state_size),
    ]
    if not with_state:
        inputs.pop()

    def run(backend):
        return lambda *xs: backend.ssd_scan(*xs, *([] if with_state else [None]), sequences=sequences)

    agree(run(TRITON), run(TORCH), inputs, dtype, exact=(3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_scan_of_every_head_size(size, dtype):
    torch.manual_seed(0)
    inputs = [random(1, 70, 1, size), random(1, 70, 1, size) / size**0.5, random(1, 70, 2, size)]
    inputs += [F.softplus(random(1, 70, 2) - 2), -torch.rand(2), random(1, 2, size, size)]
    agree(TRITON.ssd_scan, TORCH.ssd_scan, inputs, dtype, exact=(3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("head_dim", "state_size"), [(16, 39), (32, 32), (80, 80)])
def test_scan_of_padded_rows_with_grouped_heads(head_dim, state_size, dtype):
    """With narrow heads bf16 was wrong on an H200: ptxas 12.8 makes wrong code of wgmma (torch 2.11, triton 3.6)."""
    torch.manual_seed(0)
    rows, length, _, sequences = laid_out(("padded", [7, 140], False))
    inputs = [
        random(rows, length, 2, head_dim),
        random(rows, length, 2, state_size),
        random(rows, length, 4, state_size),
    ]
    inputs += [F.softplus(random(rows, length, 4) - 2), -2 * torch.rand(4, dtype=torch.float64)]
    run = lambda backend: lambda *xs: backend.ssd_scan(*xs, None, sequences=sequences)  # noqa: E731
    agree(run(TRITON), run(TORCH), inputs, dtype, exact=(3, 4))


def test_scan_of_narrow_heads_has_too_few_rows_for_wgmma():
    """Which needs 64; without a GPU the machine code of the test above cannot be run."""
    for head_dim, state_size, rows in [(16, 39, 32), (39, 16, 32), (32, 32, 32), (64, 33, 64), (128, 128, 64)]:
        v, k, q = (torch.empty(1, 1, size, dtype=torch.bfloat16) for size in (head_dim, state_size, state_size))
        assert triton_mmmamba._Scan.constants(v, k, q)["BLOCK_T"] == rows


@pytest.mark.parametrize("layout", [("rows", 2, 260), ("packed", [259, 129, 2]), ("padded", [257, 0, 129], True)])
def test_states_pass_through_many_chunks(layout):
    torch.manual_seed(0)
    rows, length, states, sequences = laid_out(layout)
    inputs = [random(rows, length, 1, 8), random(rows, length, 1, 8), random(rows, length, 2, 8)]
    # Slow decay: what the first chunk writes is still there in the last.
    inputs += [F.softplus(random(rows, length, 2) - 5), -0.1 * torch.rand(2, dtype=torch.float64)]
    inputs += [random(states, 2, 8, 8)]
    run = lambda backend: lambda *xs: backend.ssd_scan(*xs, sequences=sequences)  # noqa: E731
    agree(run(TRITON), run(TORCH), inputs, torch.float32, exact=(3, 4, 5))


def test_packed_sequences_with_wide_heads():
    torch.manual_seed(0)
    _, length, states, sequences = laid_out(("packed", [20, 130]))
    inputs = [random(1, length, 1, 128), random(1, length, 1, 128) / 128**0.5, random(1, length, 1, 128)]
    inputs += [F.softplus(random(1, length, 1) - 2), -torch.rand(1), random(states, 1, 128, 128)]
    run = lambda backend: lambda *xs: backend.ssd_scan(*xs, sequences=sequences)  # noqa: E731
    agree(run(TRITON), run(TORCH), inputs, torch.bfloat16, exact=(3, 4, 5))


def test_tensors_may_have_any_strides():
    torch.manual_seed(0)

    def spread(*shape):  # no axis is contiguous
        wide = torch.randn(*(2 * size for size in reversed(shape)), device=DEVICE)
        return wide[tuple(slice(None, None, 2) for _ in shape)].permute(*reversed(range(len(shape))))

    scan = [spread(2, 40, 2, 16), spread(2, 40, 2, 16), spread(2, 40, 4, 16), F.softplus(spread(2, 40, 4))]
    scan += [-spread(4).abs(), spread(2, 4, 16, 16)]
    calls = {
        "ssd_scan": scan,
        "causal_conv": [spread(2, 40, 24), spread(24, 3), spread(24), spread(2, 24, 2)],
        "gated_rmsnorm": [spread(2, 40, 3, 16), spread(2, 40, 3, 16), spread(16), 1e-5],
        "add_rmsnorm": [spread(2, 40, 16), spread(2, 40, 16), spread(16), 1e-5],
    }
    for name, arguments in calls.items():
        inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        by_backend = []
        for backend in (TRITON, TORCH):
            output = getattr(backend, name)(*inputs)
            outputs = output if isinstance(output, tuple) else (output,)
            leaves = [x for x in inputs if isinstance(x, torch.Tensor)]
            by_backend.append([*outputs, *torch.autograd.grad(sum((y * y).sum() for y in outputs), leaves)])
        for ours, theirs in zip(*by_backend, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()), msg=name
            )


def test_the_residual_stream_keeps_its_dtype():
    """As under autocast: what is added is bf16, stream and weight are fp32."""
    torch.manual_seed(0)
    x = torch.randn(5, 40, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 40), (40,)))
    by_backend = []
    for backend in (TRITON, TORCH):
        normed, total = backend.add_rmsnorm(x, residual, weight, 1e-5)
        by_backend.append([normed, total, *torch.autograd.grad((normed**2 + total).sum(), [x, residual, weight])])
    for ours, theirs in zip(*by_backend, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
def test_fp16_does_not_overflow_where_the_result_is_small(backend):
    full = lambda value, *shape: torch.full(shape, value, device=DEVICE)  # noqa: E731
    cases = [
        (12.0, 12.0, 1e-3, 1.0, -1e-4, 600),  # the state leaves the range
        (0.1, 25.0, 25.0, 1e-3, -1.0, 200),  # products of steps that do not see each other
    ]
    for v, k, q, dt, A, length in cases:
        inputs = [full(x, 1, length, 1, 128).half() for x in (v, k, q)] + [full(dt, 1, length, 1), full(A, 1)]
        y = backend.ssd_scan(*inputs, None)[0]
        truth = TORCH.ssd_scan(*(x.double() for x in inputs), None)[0]
        assert truth.abs().max() < 60_000
        assert (y.double() - truth).norm() < 3e-3 * truth.norm()


def test_kernels_are_not_specialised_for_lengths():
    """Triton compiles anew for numbers that are 1 or divisible by 16, unless told not to."""
    varying = {"tokens", "rows", "capacity", "mask_stride"}
    for module in (triton_mmmamba, attention_mmmamba):
        for function in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                lengths = varying & {argument.arg for argument in function.args.args}
                assert lengths == set(re.findall(r"'(\w+)'", ast.unparse(function.decorator_list[0]))), function.name


def test_strong_decay_over_a_long_sequence_does_not_overflow():
    torch.manual_seed(0)
    v, k, q = (torch.randn(1, 140, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    y, last = TRITON.ssd_scan(
        v, k, q, torch.full((1, 140, 1), 50.0, device=DEVICE), torch.tensor([-50.0]).to(DEVICE), None
    )
    (y.sum() + last.sum()).backward()
    assert all(x.isfinite().all() for x in (y, last, v.grad, k.grad, q.grad))


@pytest.mark.parametrize("large", LARGE)
def test_large_steps_do_not_reduce_the_precision_of_results_and_gradients(large):
    errors = largest_errors(TRITON.ssd_scan, large, DEVICE)
    assert max(errors.values()) < 5e-6, errors  # some roundings of fp32, whose unit is 6e-8


def test_nan_in_a_step_reaches_all_later_outputs():
    v, dt = torch.ones(1, 5, 1, 16, device=DEVICE), torch.ones(1, 5, 1, device=DEVICE)
    dt[:, 2] = torch.nan
    y, last = TRITON.ssd_scan(v, v, v, dt, -torch.ones(1, device=DEVICE), None)
    assert y[:, :2].isfinite().all() and y[:, 2:].isnan().all() and last.isnan().all()


@random_shapes(24)
@given(layouts, st.integers(1, 70), st.integers(2, 5), dtypes, st.booleans())
def test_convolution_and_every_gradient(layout, channels, taps, dtype, with_state):
    torch.manual_seed(0)
    rows, length, states, sequences = laid_out(layout)
    inputs = [random(rows, length, channels), random(channels, taps), random(channels)]
    inputs += [random(states, channels, taps - 1)] if with_state else []

    def run(backend):
        return lambda *xs: backend.causal_conv(*xs, *([] if with_state else [None]), sequences=sequences)

    agree(run(TRITON), run(TORCH), inputs, dtype)


@random_shapes(12)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5), st.integers(2, 130), dtypes)
def test_gated_norm_and_every_gradient(rows, length, heads, head_dim, dtype):
    torch.manual_seed(0)
    inputs = [random(rows, length, heads, head_dim), random(rows, length, heads, head_dim), random(head_dim)]
    ours, reference = (lambda *xs, norm=backend.gated_rmsnorm: [norm(*xs, 1e-5)] for backend in (TRITON, TORCH))
    agree(ours, reference, inputs, dtype)


@random_shapes(12)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), dtypes)
def test_norm_with_residual_and_every_gradient(rows, length, width, dtype):
    torch.manual_seed(0)
    inputs = [random(rows, length, width), random(rows, length, width), random(width)]
    ours, reference = (lambda *xs, norm=backend.add_rmsnorm: norm(*xs, 1e-5) for backend in (TRITON, TORCH))
    agree(ours, reference, inputs, dtype)


@random_shapes(16)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(2, 150), st.integers(2, 5), dtypes)
def test_decode_step(batch, kv_heads, group, head_dim, taps, dtype):
    torch.manual_seed(0)
    heads = kv_heads * group
    channels = (2 * kv_heads + heads) * head_dim
    inputs = [random(batch, channels + heads * head_dim + heads), random(channels, taps), random(channels)]
    inputs += [random(heads), random(heads) - 3, random(head_dim)]
    inputs += [random(batch, channels, taps - 1), random(batch, heads, head_dim, head_dim)]

    def run(step):
        def steps(*xs):
            *weights, conv_state, state = xs
            outputs = [step(weights[0] * scale, *weights[1:], 1e-5, conv_state, state) for scale in (1, 0.5)]
            return [*outputs, conv_state, state]

        return steps

    agree(run(TRITON.decode_step), run(decode_step), inputs, dtype, differentiable=False, exact=(3, 4, 7))


@random_shapes(16)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(2, 140), st.integers(1, 300),
    st.integers(0, 100), dtypes, st.booleans(),
)  # fmt: skip
def test_attention_of_one_token(batch, kv_heads, group, head_dim, length, spare, dtype, masked):
    torch.manual_seed(0)
    q = torch.randn(batch, kv_heads * group, head_dim).to(DEVICE, dtype)
    k, v = torch.randn(2, batch, kv_heads, length + spare, head_dim).to(DEVICE, dtype)
    seen = torch.rand(batch, length + spare, device=DEVICE) > 0.3
    seen[:, 0] = True
    there = torch.arange(length + spare, device=DEVICE) < length
    mask = (there & seen if masked else there.expand(batch, -1))[:, None, None]
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    truth = F.scaled_dot_product_attention(q.double()[:, :, None], wide_k, wide_v, mask)[:, :, 0]
    out = attend(q, k, v, seen if masked else None, torch.tensor([length], device=DEVICE).int(), head_dim**-0.5)
    assert (out.double() - truth).norm() <= ERRORS[dtype] * truth.norm()


LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(
    "layer_types", [[FULL] * 2, [LINEAR] * 2, [LINEAR, FULL, LINEAR]], ids=["teacher", "linear", "hybrid"]
)
def test_a_model_has_the_same_outputs_gradients_and_tokens_on_torch_and_triton(layer_types):
    """More layers or larger weights would magnify fp32's own roundings beyond the tolerance."""
    layers = {"layer_types": layer_types, "num_hidden_layers": len(layer_types), "num_embedding_layers": 1}
    ids = torch.stack([token_ids(133, seed=1), token_ids(133, seed=2)]).to(DEVICE)  # in two chunks
    mask = (torch.arange(133) >= torch.tensor([[0], [102]])).long().to(DEVICE)
    answers = []
    for implementation, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        model = tiny_model("linear", **layers, initializer_range=0.1).to(DEVICE, dtype).requires_grad_()
        model.config.ssm_implementation = implementation
        output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        output.loss.backward()
        values = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        values |= {"loss": output.loss, "logits": output.logits * mask[..., None]}
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        answers.append((values, tokens))
    (truths, expected), (values, tokens) = answers
    assert values.keys() == truths.keys()
    for name, truth in truths.items():
        assert (values[name].double() - truth).norm() <= 2e-5 * truth.norm(), name
    assert torch.equal(tokens, expected)


def test_hooked_or_replaced_modules_are_called_in_decoding_steps():
    """Where somebody listens to the convolution or the norm, the fused step does not go around them."""
    layers = {"layer_types": [LINEAR, LINEAR], "num_hidden_layers": 2, "num_embedding_layers": 1}
    ids, more, logits = token_ids(9, seed=1)[None].to(DEVICE), token_ids(1, seed=2)[None].to(DEVICE), []
    for implementation in ("torch", "triton"):
        model = tiny_model("linear", **layers).float().to(DEVICE)
        model.config.ssm_implementation = implementation
        model.model.layers[0].mamba.norm.register_forward_hook(lambda module, args, output: 1.5 * output)
        with torch.no_grad():
            cache = model.new_cache()
            model(ids, **{CACHE: cache})
            logits.append(model(more, **{CACHE: cache}).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_empty_sequences_leave_the_states_unchanged():
    sequences = Sequences.from_mask(torch.zeros(2, 3, device=DEVICE))
    v, q, dt = (torch.zeros(1, 0, 2, *size, device=DEVICE) for size in ((16,), (16,), ()))
    state, conv_state = torch.randn(2, 2, 16, 16, device=DEVICE), torch.randn(2, 8, 1, device=DEVICE)
    weight = torch.ones(8, 2, device=DEVICE)
    for backend in (TORCH, TRITON):
        y, last = backend.ssd_scan(v, v, q, dt, -torch.ones(2, device=DEVICE), state, sequences=sequences)
        assert y.shape == v.shape and torch.equal(last, state)
        x = torch.zeros(1, 0, 8, device=DEVICE)
        y, last = backend.causal_conv(x, weight, weight[:, 0], conv_state, sequences)
        assert y.shape == x.shape and torch.equal(last, conv_state)


# At the released size nothing spills, which would be slow; 99 KiB is the shared memory of today's smallest GPUs.
@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [(80, 128, "bfloat16"), (90, 128, "bfloat16"), (80, 128, "float16"), (80, 128, "float32"), (80, 256, "bfloat16")],
)
def test_every_kernel_compiles_for_a_gpu_and_fits_its_shared_memory(capability, head_dim, dtype):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(capability), str(head_dim), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    text = "".join(Path(module.__file__).read_text() for module in (triton_mmmamba, attention_mmmamba))
    launched = set(re.findall(r"^ +(_\w+_kernel)\[", text, re.MULTILINE))
    assert set(kernels) == launched and len(launched) == 17
    for name, (shared, _, spilled) in kernels.items():
        assert shared <= 99 * 1024, (name, shared)
        assert spilled == 0 or dtype == "float32", (name, spilled)
