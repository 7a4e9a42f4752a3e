"""Which backend runs the operations of the Mamba-2 mixer, and why.

- `torch`: the reference, `ssm_mmmamba`. Runs everywhere and in every dtype.
- `cpu`: the reference for prompts, our C kernels for decoding steps, `cpu_mmmamba`. CPUs with a C compiler at hand.
- `triton`: our kernels, `triton_mmmamba`. CUDA devices; Triton comes with PyTorch there.
- `cuda`: the published fused kernels, `cuda_mmmamba`. CUDA devices with mamba_ssm and causal_conv1d installed.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .cpu_mmmamba import CPU, DTYPES, is_ordinary, kernels, reason_without_kernels
from .ssm_mmmamba import ENVIRONMENT, TORCH, Backend


logger = logging.get_logger(__name__)
BACKENDS = ("torch", "cpu", "triton", "cuda")
FASTEST_FIRST = ("triton", "cuda", "cpu", "torch")
# Rows up to which the CPU kernels multiply faster than torch: `python -m mmmamba.benchmarks.products`.
FEW_ROWS = {torch.float32: 8, torch.bfloat16: 4}


def find(name: str) -> tuple[Backend | None, str]:
    """A backend, or None where it cannot be imported.

    Args:
        name: One of `BACKENDS`.

    Returns:
        The backend or None, and a phrase that says which and why ("cannot be imported: No module named 'triton'").
    """
    if name == "cpu":
        reason = reason_without_kernels()
        return (CPU, "has its kernels") if reason is None else (None, f"has no kernels: {reason}")
    return _imported(name)


@lru_cache
def _imported(name: str) -> tuple[Backend | None, str]:
    try:
        if name == "triton":
            from .triton_mmmamba import TRITON as found
        elif name == "cuda":
            from .cuda_mmmamba import CUDA as found
        else:
            return TORCH, "is part of the package"
    except Exception as error:  # a compiled package that does not fit the installed PyTorch may raise anything
        return None, f"cannot be imported: {error}"
    return found, "can be imported"


def backend(device: torch.device, dtype: torch.dtype = torch.float32, requested: str = "auto") -> Backend:
    """The backend for tensors of this device and dtype.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        requested: `config.ssm_implementation`: "torch", "cpu", "triton", "cuda", or "auto" for the fastest that can
            run. The environment variable `MMMAMBA_SSM` overrides it.

    Raises:
        ValueError: if the name is unknown, or that backend cannot run there.
    """
    requested = os.environ.get(ENVIRONMENT) or requested
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced and device.type == "cpu" and requested in ("auto", "cpu"):
        return TORCH  # a graph cannot hold what is called through ctypes
    return _backend(device.type, dtype, requested)


@lru_cache
def _backend(device_type: str, dtype: torch.dtype, requested: str) -> Backend:
    if requested == "auto":
        chosen = next(name for name in FASTEST_FIRST if unavailable_reason(name, device_type, dtype) is None)
        triton, reason = find("triton")
        if triton is None and _unsupported_reason("triton", device_type, dtype) is None:
            logger.warning_once(
                f"The triton backend {reason}. Mamba-2 layers on this GPU run on the {chosen} backend instead, which "
                f"may be much slower; install the triton release that your PyTorch asks for, or set "
                f"ssm_implementation={chosen!r} to hide this warning."
            )
        return find(chosen)[0]
    if requested not in BACKENDS:
        raise ValueError(f"ssm_implementation={requested!r} is unknown; use auto, {', '.join(BACKENDS)}.")
    interpreted = requested == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # tests run kernels on the CPU
    reason = unavailable_reason(requested, "cuda" if interpreted else device_type, dtype)
    if reason is not None:
        raise ValueError(f"The {requested} backend {reason}; use ssm_implementation='auto'.")
    return find(requested)[0]


def _unsupported_reason(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    if name == "torch":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return f"runs on CPUs, and the tensors are on {device_type}"
        return None if dtype in DTYPES else f"takes fp32 and bf16, and the tensors are {dtype}"
    if device_type != "cuda":
        return f"runs on CUDA devices, and the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, and the tensors are {dtype}"
    return None


def unavailable_reason(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run tensors of `dtype` on devices of this type ("cpu", "cuda", …); None if it can.

    A phrase that follows the backend's name: "takes fp32, bf16 and fp16, and the tensors are torch.float64".
    """
    reason = _unsupported_reason(name, device_type, dtype)
    if reason is None:
        found, why = find(name)
        reason = why if found is None else None
    return reason


def are_plain(modules: dict[nn.Module, type], device: torch.device) -> bool:
    """Whether a fused kernel may read the weights of modules instead of calling them.

    Args:
        modules: Each with the type that it had when the model was made.
        device: Where their weights should be.

    Returns:
        False where somebody replaced one, hooked it, or keeps its weights elsewhere until it is called.
    """
    return all(
        type(module) is kind
        and module.weight.device == device
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module, kind in modules.items()
    )


def without_cudnn_attention(device: torch.device) -> AbstractContextManager:
    """Inference on a GPU without cuDNN's kernel of `F.scaled_dot_product_attention`, which plans for every new length.

    On an H200 (torch 2.11, 26 November 2026) the first prompt of 9,001 tokens took a hybrid 2.0 s, the second 0.17 s.
    Training, whose rows have few lengths, keeps torch's choice, and so does a graph that is being compiled.
    """
    eager_inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _cudnn_attention_off() if device.type == "cuda" and eager_inference else nullcontext()


@contextmanager
def _cudnn_attention_off() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def runs_as_written(x: Tensor) -> bool:
    """Whether operations on `x` are run at once and as they stand: without gradients, transforms, or autocast."""
    return is_ordinary(x) and not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`; few rows on a CPU, as in a decoding step, are multiplied on all cores at the rate of its memory.

    BLAS multiplies a single row of fp32 on one core, and torch's bf16 products read more slowly than the memory is. A
    layer that is quantised, hooked, replaced or elsewhere is called as it is.

    Args:
        layer: To (..., out).
        x: (..., width).
    """
    if not runs_as_written(x):  # first: a graph that is being made may serve other numbers of rows
        return layer(x)
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or rows > FEW_ROWS.get(x.dtype, 0):
        return layer(x)
    if not are_plain({layer: nn.Linear}, x.device):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    if any(type(tensor) is not nn.Parameter or tensor.dtype != x.dtype for tensor in parameters):
        return layer(x)
    if not all(tensor.is_contiguous() for tensor in parameters) or rows == 0:
        return layer(x)
    if weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        return layer(x)  # which says so
    if (compiled := kernels()) is not None:
        return compiled.multiply_dense(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    if x.dtype != torch.float32 or rows > 1 or bias is not None or len(weight) % 4:
        return layer(x)
    slices = weight.view(4, -1, weight.shape[1]).transpose(1, 2)  # (4, width, out / 4)
    return torch.bmm(x.reshape(1, 1, -1).expand(4, 1, -1), slices).view(*x.shape[:-1], -1)
