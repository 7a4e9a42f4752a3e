"""Weights in 4 and 8 bits: their format, and products with them."""

import copy
import pickle
import struct

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mmmamba import quantization_mmmamba as quantization
from mmmamba.quantization_mmmamba import QuantizedLinear, dequantize_weight, quantize_weight


SHAPES_OF_WEIGHTS = [(16, 32), (33, 96), (388, 128), (5, 320)]
every_width = pytest.mark.parametrize("bits", [4, 8])


def random_weight(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def unpacked(packed, bits, row, column):
    """One weight, by the format's definition."""
    block = packed[row // 16, column // 32].numpy().tobytes()
    r, inside = row % 16, column % 32
    (scale,) = struct.unpack("<e", block[2 * r : 2 * r + 2])
    if bits == 8:
        s, j = divmod(inside, 4)
        return (block[32 + s * 64 + r * 4 + j] - 128) * scale
    p, half, j = inside // 8, inside % 8 // 4, inside % 4
    byte = block[32 + p * 64 + r * 4 + j]
    return ((byte >> 4 if half else byte & 15) - 8) * scale


# --- format ----------------------------------------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("rows, width", SHAPES_OF_WEIGHTS)
def test_the_format_is_the_one_that_is_documented(bits, rows, width):
    weight = random_weight(rows, width)
    packed = quantize_weight(weight, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-rows // 16), width // 32, 288 if bits == 4 else 544)
    expected = [[unpacked(packed, bits, row, column) for column in range(width)] for row in range(rows)]
    values = dequantize_weight(packed, bits, rows, torch.float64)
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(dequantize_weight(packed, bits, rows, torch.float32), values.float())
    assert torch.equal(dequantize_weight(packed, bits, rows, torch.bfloat16), values.bfloat16())
    assert all(unpacked(packed, bits, row, column) == 0 for row in range(rows, 16 * len(packed)) for column in (0, 31))


def test_8_bits_err_by_half_a_step_and_4_bits_less_than_when_the_largest_becomes_8():
    weight = random_weight(64, 256)
    groups = weight.double().view(-1, 32)
    steps = groups.abs().amax(1, keepdim=True) / 127
    error = (dequantize_weight(quantize_weight(weight, 8), 8, 64, torch.float64).view(-1, 32) - groups).abs()
    assert (error <= steps * 0.5 + groups.abs() * 2**-11).all()  # scales are rounded to fp16

    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    simple = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8) - groups
    error = dequantize_weight(quantize_weight(weight, 4), 4, 64, torch.float64).view(-1, 32) - groups
    assert error.square().mean() < 0.92 * simple.square().mean()


@every_width
def test_nothing_tiny_or_large_is_lost_but_what_fp16_scales_cannot_say(bits):
    tiny = random_weight(16, 32) * 1e-4  # scales are subnormal numbers
    values = dequantize_weight(quantize_weight(tiny, bits), bits, 16, torch.float32)
    assert (values - tiny).abs().max() < 0.15 * tiny.abs().max()
    for nothing in (torch.zeros(16, 32), torch.full((16, 32), 1e-12), torch.full((16, 32), -1e-40)):
        assert not dequantize_weight(quantize_weight(nothing, bits), bits, 16, torch.float32).any()
    large = random_weight(16, 32) / 0.05 * 1e4
    assert dequantize_weight(quantize_weight(large, bits), bits, 16, torch.float32).isfinite().all()
    for broken in (float("nan"), float("inf")):
        large[3, 7] = broken
        with pytest.raises(ValueError, match="NaN or infinite; the model is damaged"):
            quantize_weight(large, bits)
    with pytest.raises(ValueError, match="more than the 65504 of fp16"):
        quantize_weight(torch.full((16, 32), 1e8), bits)


@every_width
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_quantised_as_its_values_in_fp32_are(bits, dtype):
    weight = random_weight(40, 64).to(dtype)
    assert torch.equal(quantize_weight(weight, bits), quantize_weight(weight.float(), bits))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation makes."""

    def __init__(self, given):
        super().__init__()
        self.given, self.nbytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.given:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@every_width
def test_weights_are_quantised_a_piece_at_a_time(bits):
    weight = random_weight(4096, 1024).bfloat16()
    with Largest(weight) as largest:
        packed = quantize_weight(weight, bits)
    assert largest.nbytes <= packed.nbytes


# --- products --------------------------------------------------------------------------------------------------------


def layer(bits, rows=388, width=128, bias=True, dtype=torch.float32):
    made = nn.Linear(width, rows, bias=bias)
    nn.init.normal_(made.weight, std=0.05)
    return QuantizedLinear.from_linear(made, bits).to(dtype)


def expected_product(layer, x):
    weight = dequantize_weight(layer.weight, layer.bits, layer.out_features, torch.float64)
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())


@every_width
@pytest.mark.parametrize("rows, width", SHAPES_OF_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_products_are_those_of_the_dequantised_weight(kernels, bits, rows, width, dtype):
    one = layer(bits, rows, width, bias=rows % 2 == 1, dtype=dtype)
    inputs = [torch.randn(shape).to(dtype) for shape in ((width,), (1, 1, width), (3, width), (2, 37, width))]
    inputs += [inputs[2].T.contiguous().T, inputs[3][:, -1], inputs[2][:0]]
    for x in inputs:
        y, expected = one(x), expected_product(one, x)
        assert y.shape == (*x.shape[:-1], rows) and y.dtype == dtype
        # Kernels round their input, to 8 bits in groups of 32 or to bf16; torch alone computes in the input's dtype.
        tolerance = 1e-12 if dtype == torch.float64 else 0.02
        # Of the length that a product of independent numbers has; one of few rows may be short by chance.
        weight = dequantize_weight(one.weight, bits, rows, torch.float64)
        usual = weight.norm() * x.double().norm() / width**0.5
        assert (y.double() - expected).norm() <= tolerance * torch.maximum(usual, expected.norm())


@every_width
def test_gradients_pass_through_to_the_input(bits):
    one = layer(bits, 33, 64, dtype=torch.float64)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 33, dtype=torch.float64)
    y = one(x)
    y.backward(upstream)
    assert torch.allclose(y, expected_product(one, x))
    assert torch.allclose(x.grad, upstream @ dequantize_weight(one.weight, bits, 33, torch.float64))
    assert one.weight.grad is None and torch.allclose(one.bias.grad, upstream.sum((0, 1)))


@every_width
@torch.no_grad()
def test_fp16_inputs_are_multiplied_by_kernels_as_fp32(kernels, bits, monkeypatch):
    one, x = layer(bits, 48, 64, bias=False), torch.randn(3, 64).half()
    expected = one(x.float()).half()
    monkeypatch.setattr(quantization, "_multiply", lambda *given: pytest.fail("dequantised"))
    y = one.half()(x)
    assert y.dtype == torch.float16 and torch.equal(y, expected)


@every_width
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, of make_dual
def test_transforms_of_functions_see_the_product(bits):
    one, x, tangent = layer(bits, 33, 64, bias=False), torch.randn(3, 64), torch.randn(3, 64)
    weight = dequantize_weight(one.weight, bits, 33, torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        carried = forward_ad.unpack_dual(one(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(carried, tangent @ weight.T)
    with torch.no_grad():
        y, carried = torch.func.jvp(one, (x,), (tangent,))
        torch.testing.assert_close(y, x @ weight.T)
        torch.testing.assert_close(carried, tangent @ weight.T)
        torch.testing.assert_close(torch.func.vmap(one)(x), x @ weight.T)
    gradient = torch.func.grad(lambda x: one(x).sum())
    torch.testing.assert_close(gradient(x), weight.sum(0).expand(3, 64))
    torch.testing.assert_close(torch.func.vmap(gradient)(x), weight.sum(0).expand(3, 64))
    _, carried = torch.func.jvp(one, (x.clone().requires_grad_(),), (tangent,))
    torch.testing.assert_close(carried, tangent @ weight.T)


@every_width
@torch.no_grad()
def test_layers_survive_casts_copies_pickles_and_state_dicts(kernels, bits):
    one, x = layer(bits), torch.randn(3, 128)
    expected = one(x)
    for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), copy.deepcopy(one).bfloat16().float()):
        assert same.weight.dtype == torch.uint8 and torch.equal(same.weight, one.weight)
        if not torch.equal(same.bias, one.bias):  # which bf16 has rounded
            same.bias.copy_(one.bias)
        assert torch.equal(same(x), expected)
    other = layer(bits)
    assert not torch.equal(other(x), expected)  # a format of torch's is made here, and must be made anew below
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), expected)
    other.weight = nn.Parameter(layer(bits).weight, requires_grad=False)
    assert not torch.equal(other(x), expected)
    assert set(one.state_dict()) == {"weight", "bias"}


@torch.no_grad()
def test_compiled_layers_give_the_same(monkeypatch):
    torch.compiler.reset()
    one, x = layer(4), torch.randn(3, 128)
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected_product(one, x).float())


def test_layers_refuse_what_has_no_format():
    with pytest.raises(ValueError, match="bits=3 is no number of bits that weights can have; give 4 or 8"):
        QuantizedLinear(32, 16, 3)
    with pytest.raises(ValueError, match="in_features=48 is no multiple of 32"):
        QuantizedLinear(48, 16, 4)
    with pytest.raises(ValueError, match="with 48 inputs cannot be quantised"):
        quantize_weight(torch.zeros(16, 48), 4)


@every_width
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_products_on_a_gpu_are_those_of_the_dequantised_weight(bits):
    one, x = layer(bits), torch.randn(3, 128)
    expected = expected_product(one, x).float()
    torch.testing.assert_close(one.cuda()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        quantize_weight(random_weight(40, 64).cuda(), bits).cpu(), quantize_weight(random_weight(40, 64), bits)
    )
