"""The `cuda` backend, on mamba_ssm's Triton sources, equals the reference; our kernels are as exact."""

import importlib

import mamba_ssm_kernels
import pytest
import torch
import torch.nn.functional as F

from mmmamba.backends_mmmamba import find
from mmmamba.ssm_mmmamba import TORCH, Sequences, decode_step


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THEIR_ERROR = 1e-4 if DEVICE == "cpu" else 3e-3  # on a GPU their fp32 products are tf32, as coarse as fp16


@pytest.fixture(scope="module")
def cuda():
    with pytest.MonkeyPatch.context() as monkeypatch:
        mamba_ssm_kernels.install(monkeypatch)
        yield importlib.import_module("mmmamba.cuda_mmmamba").CUDA


def scan_inputs(rows, length, dtype, kv_heads=2, group=2, size=16):
    torch.manual_seed(0)
    v, k = torch.randn(2, rows, length, kv_heads, size, device=DEVICE).to(dtype)
    q = torch.randn(rows, length, kv_heads * group, size, device=DEVICE).to(dtype)
    dt = F.softplus(torch.randn(rows, length, kv_heads * group, device=DEVICE) - 2)
    A = -torch.rand(kv_heads * group, device=DEVICE)
    return v, k, q, dt, A, torch.randn(rows, kv_heads * group, size, size, device=DEVICE)


def outputs_and_gradients(backend, inputs, sequences=None, dtype=None):
    """y, the last state and every input's gradient."""
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
    y, last = backend.ssd_scan(*leaves, 32, sequences)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in (y, last)]
    ((y * upstream[0]).sum() + (last * upstream[1]).sum()).backward()
    return [y.detach(), last.detach(), *(x.grad for x in leaves)]


def relative_errors(values, truths):
    return [
        ((value.double() - truth).norm() / truth.norm()).item() for value, truth in zip(values, truths, strict=True)
    ]


def test_the_scan_equals_the_reference(cuda):
    inputs = scan_inputs(2, 70, torch.float32)
    assert (
        max(
            relative_errors(
                outputs_and_gradients(cuda, inputs), outputs_and_gradients(TORCH, inputs, dtype=torch.float64)
            )
        )
        < THEIR_ERROR
    )


def test_packed_sequences_do_not_mix(cuda):
    v, k, q, dt, A, _ = scan_inputs(1, 65, torch.float32)
    sequences = Sequences.from_position_ids(torch.cat([torch.arange(40), torch.arange(25)])[None].to(DEVICE))
    inputs = v, k, q, dt, A, torch.randn(2, 4, 16, 16, device=DEVICE)
    assert (
        max(
            relative_errors(
                outputs_and_gradients(cuda, inputs, sequences),
                outputs_and_gradients(TORCH, inputs, sequences, torch.float64),
            )
        )
        < THEIR_ERROR
    )
    x = torch.randn(1, 65, 16, device=DEVICE)
    arguments = torch.randn(16, 2, device=DEVICE), torch.randn(16, device=DEVICE), torch.randn(2, 16, 1, device=DEVICE)
    for value, truth in zip(
        cuda.causal_conv(x, *arguments, sequences), TORCH.causal_conv(x, *arguments, sequences), strict=True
    ):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_our_triton_kernels_are_as_exact_as_mamba_ssms(cuda, dtype):
    triton, reason = find("triton")
    if triton is None:
        pytest.skip(f"triton {reason}")
    if DEVICE == "cpu" and dtype != torch.float32:
        pytest.skip("Triton's interpreter multiplies bf16 as integers in their kernels, and fp16 overflows")
    inputs = scan_inputs(1, 135, dtype)
    truth = outputs_and_gradients(TORCH, inputs, dtype=torch.float64)
    for ours, theirs in zip(
        relative_errors(outputs_and_gradients(triton, inputs), truth),
        relative_errors(outputs_and_gradients(cuda, inputs), truth),
        strict=True,
    ):
        assert ours <= max(2 * theirs, 1e-5)  # below, both are exact for every use


@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_equals_the_reference_and_continues_a_state(cuda, taps):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 16), torch.randn(16, taps), torch.randn(16)
    x, weight, bias = (t.to(DEVICE) for t in (x, weight, bias))
    expected, _ = TORCH.causal_conv(x, weight, bias, None)
    for cut in (1, 2, 8):
        first, state = cuda.causal_conv(x[:, :cut], weight, bias, None)
        second, state = cuda.causal_conv(x[:, cut:], weight, bias, state)
        torch.testing.assert_close(torch.cat([first, second], 1), expected)
        torch.testing.assert_close(state, x[:, -(taps - 1) :].transpose(1, 2))


def test_the_decode_step_equals_the_reference(cuda):
    torch.manual_seed(0)
    batch, kv_heads, heads, size = 2, 2, 4, 16
    channels = (2 * kv_heads + heads) * size
    shapes = [(batch, channels + heads * size + heads), (channels, 2), (channels,), (heads,), (heads,), (size,)]
    arguments = [torch.randn(shape, device=DEVICE) for shape in shapes]
    states = [torch.randn(batch, channels, 1, device=DEVICE), torch.randn(batch, heads, size, size, device=DEVICE)]
    ours, theirs = [x.clone() for x in states], [x.clone() for x in states]
    for _ in range(2):
        expected = decode_step(*arguments, 1e-5, *ours)
        torch.testing.assert_close(cuda.decode_step(*arguments, 1e-5, *theirs), expected, rtol=1e-4, atol=1e-5)
    for value, truth in zip(theirs, ours, strict=True):
        torch.testing.assert_close(value, truth)
