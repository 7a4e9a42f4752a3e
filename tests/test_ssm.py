"""The state-space maths against a step-by-step fp64 recurrence written from the equations."""

import pytest
import torch
import torch.nn.functional as F
from large_steps import LARGE, largest_errors

from mmmamba.ssm_mmmamba import (
    Sequences,
    causal_conv,
    decay_between,
    decode_step,
    gated_rmsnorm,
    ssd_scan,
    ssd_step,
)


def random_inputs(length, heads=4, kv_heads=2, head_dim=6, state_size=10, batch=2, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(length)
    v, k = draw(batch, length, kv_heads, head_dim), draw(batch, length, kv_heads, state_size)
    q = draw(batch, length, heads, state_size)
    dt = F.softplus(draw(batch, length, heads).to(torch.promote_types(dtype, torch.float32)))
    A = -torch.rand(heads, generator=generator).to(dt.dtype) * 2
    state = draw(batch, heads, head_dim, state_size).to(dt.dtype)
    return v, k, q, dt, A, state


def recurrence(v, k, q, dt, A, state):
    """S_t = exp(A dt_t) S_{t-1} + dt_t v_t k_t^T, y_t = S_t q_t, one step and one head at a time."""
    v, k, q, dt, A = (x.double() for x in (v, k, q, dt, A))
    batch, length, heads = dt.shape
    group = heads // v.shape[2]
    S = torch.zeros(batch, heads, v.shape[-1], k.shape[-1]).double() if state is None else state.double().clone()
    y = torch.zeros(batch, length, heads, v.shape[-1]).double()
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                written = dt[b, t, h] * torch.outer(v[b, t, h // group], k[b, t, h // group])
                S[b, h] = torch.exp(A[h] * dt[b, t, h]) * S[b, h] + written
                y[b, t, h] = S[b, h] @ q[b, t, h]
    return y, S


@pytest.mark.parametrize("length", [1, 7, 16, 63])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 128])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_equals_the_recurrence(length, chunk_size, with_state):
    *inputs, state = random_inputs(length)
    state = state if with_state else None
    y, last = ssd_scan(*inputs, state, chunk_size)
    expected_y, expected_last = recurrence(*inputs, state)
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, expected_last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (6, 1)])
def test_query_heads_share_keys_and_values_of_their_group(heads, kv_heads):
    *inputs, state = random_inputs(11, heads, kv_heads)
    torch.testing.assert_close(ssd_scan(*inputs, state, 4)[0], recurrence(*inputs, state)[0])


def test_step_equals_the_recurrence():
    v, k, q, dt, A, state = random_inputs(9)
    expected_y, expected_last = recurrence(v, k, q, dt, A, state)
    ys = [ssd_step(v[:, t], k[:, t], q[:, t], dt[:, t], A, state) for t in range(9)]
    torch.testing.assert_close(torch.stack(ys, 1), expected_y)
    torch.testing.assert_close(state, expected_last)


def test_scan_in_two_parts_equals_the_whole():
    v, k, q, dt, A, state = random_inputs(37)
    y, last = ssd_scan(v, k, q, dt, A, state, 8)
    first, middle = ssd_scan(v[:, :13], k[:, :13], q[:, :13], dt[:, :13], A, state, 8)
    second, end = ssd_scan(v[:, 13:], k[:, 13:], q[:, 13:], dt[:, 13:], A, middle, 8)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_of_the_scan_are_those_of_the_recurrence(with_state):
    inputs = [x.requires_grad_() for x in random_inputs(13)]
    if not with_state:
        inputs[-1] = None
    leaves = [x for x in inputs if x is not None]
    y, last = ssd_scan(*inputs, 5)
    upstream = torch.randn_like(y), torch.randn_like(last)
    gradients = torch.autograd.grad([y, last], leaves, upstream)
    # The same recurrence, differentiable.
    v, k, q, dt, A, state = inputs
    S = torch.zeros_like(last) if state is None else state
    group, ys = q.shape[2] // k.shape[2], []
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    for t in range(13):
        written = (dt[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None, :]
        S = (A * dt[:, t]).exp()[..., None, None] * S + written
        ys.append((S @ q[:, t, :, :, None]).squeeze(-1))
    expected = torch.autograd.grad([torch.stack(ys, 1), S], leaves, upstream)
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_stays_near_fp64(dtype, error):
    *inputs, state = random_inputs(200, dtype=dtype)
    y, last = ssd_scan(*inputs, state, 64)
    expected_y, expected_last = recurrence(*inputs, state)
    assert last.dtype == torch.float32
    assert (y.double() - expected_y).norm() / expected_y.norm() < error
    assert (last.double() - expected_last).norm() / expected_last.norm() < error


def test_strong_decay_over_a_long_sequence_does_not_overflow():
    v, k, q, dt, A, _ = random_inputs(300, dtype=torch.float32)
    y, last = ssd_scan(v, k, q, dt * 50, A * 50, None, 128)
    assert y.isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70, 260])
def test_decay_between_two_steps_is_the_product_of_the_decays_behind_the_first(length):
    log_decay = -torch.rand(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            expected[:, i, j] = log_decay[:, j + 1 : i + 1].sum(1).exp()
    torch.testing.assert_close(decay_between(log_decay), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 37, 128])
@pytest.mark.parametrize("large", LARGE)
def test_large_steps_do_not_reduce_the_precision_of_results_and_gradients(large, chunk_size):
    errors = largest_errors(lambda *inputs: ssd_scan(*inputs, chunk_size), large)
    assert max(errors.values()) < 5e-6, errors  # some roundings of fp32, whose unit is 6e-8


@pytest.mark.parametrize("taps", [2, 4])
def test_convolution_equals_torch_and_may_be_split_anywhere(taps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=generator).double()
    weight, bias = torch.randn(5, taps).double(), torch.randn(5).double()
    expected = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=5))
    for cut in range(10):
        pieces, state = [], None
        for piece in (x[:, :cut], x[:, cut : cut + 1], x[:, cut + 1 :]):
            out, state = causal_conv(piece, weight, bias, state)
            pieces.append(out)
        torch.testing.assert_close(torch.cat(pieces, 1), expected.transpose(1, 2))
        torch.testing.assert_close(state, x[:, -(taps - 1) :].transpose(1, 2))


def test_conv_state_ends_at_the_last_valid_step():
    x = torch.arange(12.0).view(2, 6, 1)
    sequences = Sequences.from_mask(torch.tensor([[1, 1, 1, 1, 0, 0], [0] * 6]))
    _, state = causal_conv(sequences.pack(x), torch.ones(1, 3), torch.zeros(1), None, sequences)
    assert state.tolist() == [[[2.0, 3.0]], [[0.0, 0.0]]]


def test_the_gated_norm_normalises_before_gating():
    generator = torch.Generator().manual_seed(0)
    y, gate = (torch.randn(3, 4, 8, generator=generator).double() for _ in range(2))
    weight = torch.rand(8).double()
    expected = F.rms_norm(y, (8,), weight, 1e-5) * gate * torch.sigmoid(gate)
    torch.testing.assert_close(gated_rmsnorm(y, gate, weight, 1e-5), expected)


def test_decode_steps_equal_convolution_scan_and_norm_of_the_sequence():
    """Both states go on as those of the convolution and the scan over the whole sequence."""
    torch.manual_seed(0)
    batch, length, kv_heads, heads, size, taps = 2, 6, 2, 4, 6, 3
    channels = (2 * kv_heads + heads) * size
    projected = torch.randn(batch, length, channels + heads * size + heads).double()
    weight, bias = torch.randn(channels, taps).double(), torch.randn(channels).double()
    A_log, dt_bias, norm = torch.randn(heads).double(), torch.randn(heads).double(), torch.rand(size).double()
    vkq, gate, dt = projected.split([channels, heads * size, heads], -1)
    vkq, conv_state = causal_conv(vkq, weight, bias, None)
    v, k, q = (x.unflatten(-1, (-1, size)) for x in vkq.split([kv_heads * size] * 2 + [heads * size], -1))
    y, state = ssd_scan(v, k, q, F.softplus(dt + dt_bias), -A_log.exp(), None, 4)
    expected = gated_rmsnorm(y, gate.unflatten(-1, (-1, size)), norm, 1e-5)
    states = torch.zeros(batch, channels, taps - 1).double(), torch.zeros(batch, heads, size, size).double()
    for t in range(length):
        out = decode_step(projected[:, t], weight, bias, A_log, dt_bias, norm, 1e-5, *states)
        torch.testing.assert_close(out, expected[:, t])
    torch.testing.assert_close(states, (conv_state, state))


def test_length_buckets_pad_to_less_than_twice_the_steps_and_give_the_results_of_each_sequence_alone():
    """One long and many short ones, an empty one among them, as if each were alone."""
    lengths = [900, *[3, 10, 0, 7] * 20]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequences = Sequences(offsets, None, (1, sum(lengths)))
    assert sum(len(group.lengths) * group.max_length for *_, group in sequences.length_buckets) < 2 * sum(lengths)
    generator = torch.Generator().manual_seed(0)
    v, k, q, x = (
        torch.randn(1, sum(lengths), *size, generator=generator, dtype=torch.float64)
        for size in ((1, 4), (1, 4), (2, 4), (6,))
    )
    dt, A = torch.rand(1, sum(lengths), 2, generator=generator, dtype=torch.float64), -torch.ones(2)
    state, conv_state = (
        torch.randn(len(lengths), *size, generator=generator, dtype=torch.float64) for size in ((2, 4, 4), (6, 2))
    )
    weight, bias = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    y, last = ssd_scan(v, k, q, dt, A, state, sequences=sequences)
    out, conv_last = causal_conv(x, weight, bias, conv_state, sequences)
    for i, length in enumerate(lengths):
        own = slice(offsets[i], offsets[i + 1])
        if length:
            alone, alone_last = ssd_scan(*(t[:, own] for t in (v, k, q, dt)), A, state[i : i + 1])
            torch.testing.assert_close(y[:, own], alone)
            conv_alone, conv_alone_last = causal_conv(x[:, own], weight, bias, conv_state[i : i + 1])
            torch.testing.assert_close(out[:, own], conv_alone)
        else:
            alone_last, conv_alone_last = state[i : i + 1], conv_state[i : i + 1]
        torch.testing.assert_close(last[i : i + 1], alone_last)
        torch.testing.assert_close(conv_last[i : i + 1], conv_alone_last)


def test_accelerate_moves_sequences_to_a_layer_on_another_device():
    from accelerate.utils import send_to_device

    sequences = Sequences.from_mask(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    moved = send_to_device({"attention_mask": sequences}, "meta")["attention_mask"]
    assert moved.cu_seqlens.is_meta and moved.indices.is_meta and moved.shape == sequences.shape
    assert sequences.to("meta") is moved and sequences.to("cpu") is sequences
