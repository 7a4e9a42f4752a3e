"""Linear layers whose weights take 4 or 8 bits, and how Transformers loads and saves models that have them.

32 inputs of a row form a group with one fp16 scale; a weight is a small integer times its group's scale. The integers
are stored in the order in which a CPU multiplies them, see `quantize_weight`. `mmmamba quantize` writes such models;
`from_pretrained(..., quantization_config=MmMambaQuantizationConfig(bits=4))` quantises while loading.
"""

import re
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cpu_mmmamba import GROUP, SCALES, TILE, is_ordinary, kernels, packed_shape


METHOD = "mmmamba"  # `quant_method` in config.json
FORMAT_VERSION = 1
BITS = (4, 8)
LARGEST_SCALE, SMALLEST_SCALE = torch.finfo(torch.float16).max, 2.0**-24
# What the largest weight of a group may become before it is rounded and cut off at -8.
CANDIDATES = tuple(-6.8 - 0.16 * step for step in range(16))
PIECE = 2**18  # weights that are quantised at once
DEQUANTIZED_PIECE = 2**20  # weights that are dequantised at once
MOST_ROWS_OF_TORCH = 32  # by torch's 4-bit kernel; more are faster by dequantised weights
LAYERS = re.compile(r"(^|\.)(layers\.\d+\..*|lm_head)$")  # names of modules: of the decoder's layers, and the head


def check_bits(bits: int) -> None:
    """Raises ValueError for another number of bits than there is a format for."""
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits={bits!r} is no number of bits that weights can have; give 4 or 8.")


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int) -> Tensor:
    """Quantises the weight of a linear layer.

    8 bits: the scale is the largest magnitude over 127. 4 bits: integers from -8 to 7; of 16 scales around the one
    that makes the weight of largest magnitude -8, the one with the smallest squared error (of normally distributed
    weights 11 % less than by that one alone).

    Args:
        weight: (out, in), any floating point dtype; in a multiple of 32.
        bits: 4 or 8.

    Returns:
        uint8 (tiles, groups, bytes): a tile is 16 rows, the last one filled up with rows of zero scales, a group 32
        inputs. A block begins with the 16 scales as little-endian fp16. Integers of 4 bits follow in 256 bytes: byte
        64 p + 4 r + j (p and j from 0 to 3, r the row in the tile) has input 8 p + j of the group in its low half and
        input 8 p + 4 + j in its high half, plus 8 each. Of 8 bits in 512 bytes: byte 64 s + 4 r + j (s from 0 to 7)
        has input 4 s + j, plus 128.

    Raises:
        ValueError: if bits are others, inputs are no multiple of 32, or a weight is NaN, infinite or larger than such
            numbers get.
    """
    check_bits(bits)
    rows, width = weight.shape
    if width % GROUP:
        raise ValueError(f"A weight with {width} inputs cannot be quantised: give a multiple of {GROUP}.")
    packed = torch.empty(packed_shape(rows, width, bits), dtype=torch.uint8, device=weight.device)
    tiles = max(1, PIECE // (TILE * width))
    for first in range(0, len(packed), tiles):
        part = weight[first * TILE : (first + tiles) * TILE].float()
        if not part.isfinite().all():
            raise ValueError("A weight is NaN or infinite; the model is damaged.")
        missing = -len(part) % TILE
        groups = F.pad(part, (0, 0, 0, missing)).view(-1, GROUP)
        scales, integers = (_four_bits if bits == 4 else _eight_bits)(groups)
        packed[first : first + tiles] = _pack(scales.view(-1, width // GROUP), integers.view(-1, width), bits)
    return packed


def _rounded(scales: Tensor) -> Tensor:
    """Scales as fp16 stores them, in fp32. Raises ValueError for those that fp16 has no number for."""
    if (largest := float(scales.abs().max())) > LARGEST_SCALE:
        raise ValueError(
            f"A weight needs the scale {largest:.3g}, more than the {LARGEST_SCALE:.0f} of fp16; no trained model has "
            "weights as large."
        )
    return scales.half().float()


def _integers(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """Which multiples of scales (n, 1) come closest to weights (n, 32), as floats; 0 where fp16 made the scale 0."""
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (groups * inverse).round_().clamp_(least, most)


def _eight_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    largest = groups.abs().amax(1, keepdim=True)
    scales = _rounded(largest / 127)
    # The subnormal numbers of fp16 lie so far apart that the next smaller one may cut off the largest weights.
    scales = torch.where(scales * 127.5 < largest, scales + SMALLEST_SCALE, scales)
    return scales, _integers(groups, scales, -127, 127)


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best, least_error = None, None
    for candidate in CANDIDATES:
        scales = _rounded(largest / candidate)
        values = _integers(groups, scales, -8, 7).mul_(scales)
        error = values.sub_(groups).square_().sum(1, keepdim=True)
        best = scales if best is None else torch.where(error < least_error, scales, best)
        least_error = error if least_error is None else torch.minimum(error, least_error)
    return best, _integers(groups, best, -8, 7)


def _pack(scales: Tensor, integers: Tensor, bits: int) -> Tensor:
    """Scales (rows, groups) and integers (rows, in) as blocks."""
    groups = scales.shape[1]
    scales = scales.half().view(-1, TILE, groups).transpose(1, 2).contiguous().view(torch.uint8)
    stored = (integers + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        stored = stored.view(-1, TILE, groups, 4, 2, 4)
        stored = stored[..., 0, :] | stored[..., 1, :] << 4
    else:
        stored = stored.view(-1, TILE, groups, 8, 4)
    return torch.cat([scales, stored.permute(0, 2, 3, 1, 4).flatten(2)], dim=-1)


def _unpack(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales fp16 (rows, groups) and integers int8 (rows, groups, 32), rows filled up to whole tiles."""
    groups = packed.shape[1]
    scales = packed[..., :SCALES].contiguous().view(torch.float16).transpose(1, 2)
    stored = packed[..., SCALES:].view(-1, groups, 4 if bits == 4 else 8, TILE, 4)
    if bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], dim=3).view(-1, groups, 8, TILE, 4)
        integers = stored.view(torch.int8) - 8
    else:
        integers = (stored ^ 128).view(torch.int8)  # minus 128
    return scales.reshape(-1, groups), integers.permute(0, 3, 1, 2, 4).reshape(-1, groups, GROUP)


def dequantize_weight(packed: Tensor, bits: int, out_features: int, dtype: torch.dtype) -> Tensor:
    """What a quantised weight stands for, (out, in); exact in fp32 and fp64. See `quantize_weight`."""
    pieces = [piece for _, piece in _dequantized(packed, bits, out_features, dtype)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _dequantized(packed: Tensor, bits: int, out_features: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and what they stand for, a piece of the weight after the other."""
    tiles = max(1, DEQUANTIZED_PIECE // (packed.shape[1] * GROUP * TILE))
    for first in range(0, len(packed), tiles):
        scales, integers = _unpack(packed[first : first + tiles], bits)
        # The product is exact in fp32; half precision rounds it, not the scale.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = (integers * scales.to(wide)[..., None]).to(dtype).flatten(1)
        rows = slice(first * TILE, min((first + tiles) * TILE, out_features))
        yield rows, weight[: rows.stop - rows.start]


def _multiply(x: Tensor, packed: Tensor, bits: int, out_features: int) -> Tensor:
    """x (rows, in) times a dequantised weight, (rows, out)."""
    return torch.cat([F.linear(x, piece) for _, piece in _dequantized(packed, bits, out_features, x.dtype)], dim=1)


class _Product(torch.autograd.Function):
    """`_multiply` whose backward pass dequantises once more, instead of keeping the weight; only x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, bits: int, out_features: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.bits, ctx.out_features = bits, out_features
        return _multiply(x, packed, bits, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (packed,) = ctx.saved_tensors
        gradient = upstream.new_zeros(len(upstream), packed.shape[1] * GROUP)
        for rows, piece in _dequantized(packed, ctx.bits, ctx.out_features, upstream.dtype):
            gradient.addmm_(upstream[:, rows], piece)
        return gradient, None, None, None


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight in 4 or 8 bits; for inference, and for gradients that pass through.

    On a CPU compiled kernels multiply, where there are any (`cpu_mmmamba`), fp16 as fp32; a few rows otherwise those
    of torch, in bf16. Everything else multiplies by dequantised weights, a piece at a time, in the dtype of the input.

    Args:
        in_features: A multiple of 32.
        out_features: Any.
        bits: 4 or 8.
        bias: Whether there is one.

    Attributes:
        weight: uint8 (tiles, groups, bytes), see `quantize_weight`.
        bias: (out,) or None.

    Raises:
        ValueError: if bits are others or inputs are no multiple of 32.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        check_bits(bits)
        if in_features % GROUP:
            raise ValueError(f"in_features={in_features} is no multiple of {GROUP}; keep the layer as it is.")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        shape = packed_shape(out_features, in_features, bits)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._torch_format = None

    @classmethod
    def from_linear(cls, layer: nn.Linear, bits: int) -> "QuantizedLinear":
        """The quantised layer, which shares the bias. Raises ValueError as `quantize_weight`."""
        made = cls(layer.in_features, layer.out_features, bits, device="meta")
        made.weight = nn.Parameter(quantize_weight(layer.weight.detach(), bits), requires_grad=False)
        made.bias = layer.bias
        return made.train(layer.training)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The layer with its dequantised weight, which shares the bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(dequantize_weight(self.weight, self.bits, self.out_features, dtype))
        made.bias = self.bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def __getstate__(self) -> dict:
        """For copies and pickles: without what is made again when it is needed."""
        return super().__getstate__() | {"_torch_format": None}

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., in). Returns (..., out) in its dtype."""
        rows = x.reshape(-1, self.in_features)
        needs_gradient, ordinary = torch.is_grad_enabled() and x.requires_grad, is_ordinary(rows)
        product = self._by_kernel(rows) if ordinary and not needs_gradient else None
        if product is None:
            traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
            # Transforms of functions see operations of torch; no `autograd.Function` serves all of them.
            multiply = _Product.apply if needs_gradient and (ordinary or traced) else _multiply
            product = multiply(rows, self.weight, self.bits, self.out_features)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def _by_kernel(self, rows: Tensor) -> Tensor | None:
        """The product without the bias; None where no kernel is for it."""
        if rows.device.type != "cpu" or not len(rows):
            return None
        if rows.dtype == torch.float16:
            product = self._by_kernel(rows.float())
            return None if product is None else product.half()
        if rows.dtype not in (torch.float32, torch.bfloat16):
            return None
        if (found := kernels()) is not None:
            return found.multiply(rows, self.weight, self.bits, self.out_features)
        if len(rows) > MOST_ROWS_OF_TORCH or not _torch_multiplies():
            return None
        made = self._torch_format
        if made is None or made[0]() is not self.weight or made[1] != _version(self.weight):
            made = weakref.ref(self.weight), _version(self.weight), _in_torch_format(self.weight, self.bits)
            self._torch_format = made
        x = rows.to(torch.bfloat16).contiguous()
        product = sum(
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales).to(rows.dtype)
            for packed, scales in made[2]
        )
        return product[:, : self.out_features]


def _version(tensor: Tensor) -> tuple[int, int | None]:
    """What changes with a tensor's contents: where they are, since `.data = …` counts no version, and the version."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


@lru_cache
def _torch_multiplies() -> bool:
    """Whether torch has its 4-bit kernel for this CPU; elsewhere it multiplies without vector instructions."""
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vectors and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def _in_torch_format(packed: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    """A weight as torch's kernel multiplies it: weights of 4 bits and what they are multiplied by and added to.

    8 bits b are their upper half h and their lower half l: b - 128 = (16 (h - 8) + 7.5) + ((l - 8) + 0.5), whose two
    parts are as often above as below zero.

    Returns:
        Per weight: uint8 (rows, in / 2), and bf16 (groups, rows, 2) of scales and constants.
    """
    parts = [[] for _ in range(bits // 4)]
    tiles = 4 * max(1, DEQUANTIZED_PIECE // (packed.shape[1] * GROUP * TILE * 4))  # torch packs 64 rows together
    all_scales = []
    for piece in packed.split(tiles):
        scales, integers = _unpack(piece, bits)
        all_scales.append(scales)
        stored = integers.flatten(1).int() + 2 ** (bits - 1)
        for part, half in zip(parts, [stored] if bits == 4 else [stored >> 4, stored & 15], strict=True):
            part.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(half, 1))
    scales = torch.cat(all_scales).float().t()  # (groups, rows)
    factors = [(1, 0)] if bits == 4 else [(16, 7.5), (1, 0.5)]
    return [
        (torch.cat(part), torch.stack([scales * factor, scales * constant], dim=-1).to(torch.bfloat16))
        for part, (factor, constant) in zip(parts, factors, strict=True)
    ]


class MmMambaQuantizationConfig(QuantizationConfigMixin):
    """How a model's linear layers are quantised; what `from_pretrained` takes as `quantization_config`.

    Args:
        bits: 4 or 8.
        group_size: Inputs that share a scale; 32.
        modules_to_not_convert: Layers to leave alone: full names such as "model.layers.0.mlp.down_proj", or any
            part of one between dots, such as "lm_head", "in_proj" or "layers.0".
        format_version: Of the stored weights.
        quant_method: "mmmamba".

    Raises:
        ValueError: if a value is none of these, or the weights were written by a later version of this package.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = GROUP,
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"These weights have format_version={format_version!r}, and this code reads {FORMAT_VERSION}; get a "
                "newer version of the package, or of the folder's code."
            )
        check_bits(bits)
        if group_size != GROUP:
            raise ValueError(f"group_size={group_size!r} is not supported; give {GROUP}, or leave it out.")
        names = modules_to_not_convert or []
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"modules_to_not_convert={modules_to_not_convert!r} is no list of names of layers, such as "
                '["lm_head"].'
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method={quant_method!r} is not this package's; give {METHOD!r}.")
        self.quant_method = METHOD
        self.bits, self.group_size, self.format_version = bits, group_size, format_version
        self.modules_to_not_convert = list(names) or None

    def converts(self, name: str, layer: nn.Module) -> bool:
        """Whether a layer of this name is to be quantised: of the decoder or its head, linear, of whole groups."""
        if type(layer) is not nn.Linear or LAYERS.search(name) is None or layer.in_features % GROUP:
            return False
        return not any(f".{kept}." in f".{name}." for kept in self.modules_to_not_convert or ())


def quantization_of(config) -> MmMambaQuantizationConfig | None:
    """How a model's configuration says that this package has quantised it; None if it has not. Raises ValueError."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict):
        return MmMambaQuantizationConfig(**found) if found.get("quant_method") == METHOD else None
    return found if getattr(found, "quant_method", None) == METHOD else None


class QuantizationMixin:
    """Models whose linear layers can be quantised. What loads a model, `MmMambaHfQuantizer`, calls these.

    Several copies of this code may be in one process, the package's and those of folders, and Transformers knows one
    quantiser of this name: so that a model has the layers of its own copy, it makes them itself.
    """

    def prepare_quantized_weights(self, config: MmMambaQuantizationConfig) -> None:
        """Makes room for quantised weights, on the meta device. Raises ValueError as `quantize_weights`."""
        for name, layer in self._layers_to_quantize(config):
            dtype = None if layer.bias is None else layer.bias.dtype
            made = QuantizedLinear(
                layer.in_features, layer.out_features, config.bits, layer.bias is not None, device="meta", dtype=dtype
            )
            self._replace_linear(name, made)

    def quantize_weights(self, config: MmMambaQuantizationConfig) -> None:
        """Quantises the linear layers in place, one after the other. A tied head gets weights of its own.

        Raises:
            ValueError: if no layer can be quantised, a weight is NaN, infinite or too large, or weights are offloaded
                or on several devices.
        """
        found = self._layers_to_quantize(config)
        # Accelerate's hooks, which bring weights and inputs, would be lost with the layers that are replaced.
        devices = sorted({str(layer.weight.device) for _, layer in found})
        if len(devices) > 1 or devices == ["meta"]:
            places = " and ".join(device.replace("meta", "offloaded by Accelerate") for device in devices)
            raise ValueError(
                f"Weights to quantise are on one device, and these are {places}; load the model with "
                f"device_map={{'': 'cpu'}}, or a folder that `mmmamba quantize DIR DST --bits {config.bits}` has made."
            )
        while found:
            name, layer = found.pop()
            try:
                self._replace_linear(name, QuantizedLinear.from_linear(layer, config.bits))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in Transformers. Raises ValueError for another number of tokens if the head is quantised."""
        head = self.get_output_embeddings()
        if not isinstance(head, QuantizedLinear):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        wanted = head.out_features if new_num_tokens is None else new_num_tokens
        wanted += -wanted % (pad_to_multiple_of or 1)
        if wanted != head.out_features:
            raise ValueError(
                f"A quantised head keeps its {head.out_features} rows, so there cannot be {wanted} tokens; resize the "
                "model first and quantise it then."
            )
        return self.get_input_embeddings()

    def _layers_to_quantize(self, config: MmMambaQuantizationConfig) -> list[tuple[str, nn.Linear]]:
        found = [(name, layer) for name, layer in self.named_modules() if config.converts(name, layer)]
        if not found:
            kept = f", without {', '.join(config.modules_to_not_convert)}" if config.modules_to_not_convert else ""
            raise ValueError(
                f"No layer of this model can be quantised{kept}: inputs must be a multiple of {GROUP}, and its "
                f"hidden_size is {self.config.text_config.hidden_size}; use it as it is."
            )
        return found

    def _replace_linear(self, name: str, layer: QuantizedLinear) -> None:
        self.set_submodule(name, layer)
        if name == "lm_head":
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = False
            self.all_tied_weights_keys.pop("lm_head.weight", None)

    def dequantize_weights(self, dtype: torch.dtype) -> None:
        """Turns quantised layers into linear ones."""
        found = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, QuantizedLinear)]
        while found:
            name, layer = found.pop()
            self.set_submodule(name, layer.to_linear(dtype))

    def check_quantized_weights(self) -> None:
        """Raises ValueError if loaded weights do not fit the layers; older releases of Transformers load them."""
        for name, layer in self.named_modules():
            if isinstance(layer, QuantizedLinear):
                expected = packed_shape(layer.out_features, layer.in_features, layer.bits)
                if layer.weight.dtype != torch.uint8 or tuple(layer.weight.shape) != expected:
                    raise ValueError(
                        f"{name}.weight is {layer.weight.dtype} {tuple(layer.weight.shape)} where uint8 {expected} is "
                        f"expected, {layer.bits} bits of {layer.out_features} x {layer.in_features}; the weights do "
                        "not belong to config.json."
                    )


class MmMambaHfQuantizer(HfQuantizer):
    """Loads quantised models, and quantises models that were loaded, for Transformers' `from_pretrained`."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        if not hasattr(model, "quantize_weights"):
            raise ValueError(
                f"MmMambaQuantizationConfig is for models of mmMamba, and this is a {type(model).__name__}; use one "
                "of Transformers' own, such as BitsAndBytesConfig."
            )
        if self.pre_quantized:
            model.prepare_quantized_weights(self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            model.check_quantized_weights()
        else:
            model.quantize_weights(self.quantization_config)
        return model

    def _dequantize(self, model, dtype=None):
        model.dequantize_weights(dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


with suppress(ValueError):  # another copy of this code, the package's or that of a folder, has registered its own
    register_quantization_config(METHOD)(MmMambaQuantizationConfig)
    register_quantizer(METHOD)(MmMambaHfQuantizer)


__all__ = [
    "MmMambaHfQuantizer",
    "MmMambaQuantizationConfig",
    "QuantizationMixin",
    "QuantizedLinear",
    "dequantize_weight",
    "quantization_of",
    "quantize_weight",
]
