"""Tells whether weights, or pictures, are still those that a conversation was read with."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn


SAMPLES = 8  # elements of every tensor that `weights_sample` looks at
PIECE = 2**22  # elements of a tensor that are hashed at once


def weights_signature(model: nn.Module) -> tuple:
    """Changes when a parameter is trained, loaded or moved, and when another adapter becomes active.

    Reads no weight: PyTorch counts the changes of each tensor. Changes through `.data` are not counted; those
    `weights_sample` sees.
    """
    there = (tensor for tensor in _tensors(model) if not tensor.is_meta)  # the rest is offloaded
    tensors = tuple((_address(x), None if x.is_inference() else x._version) for x in there)
    return tensors, tuple(_adapters(model))


@torch.no_grad()
def weights_sample(model: nn.Module) -> bytes:
    """A digest of a few elements of every parameter and buffer."""
    some = []
    for tensor in _tensors(model):
        if tensor.numel() and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
            some.append(picked.to(torch.float64))
    places = {x.device for x in some}
    digest = hashlib.blake2b(digest_size=16)
    for device in sorted(places, key=str):
        digest.update(torch.cat([x for x in some if x.device == device]).cpu().numpy().tobytes())
    return digest.digest()


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """A checksum over every element of every parameter and buffer, and the names of active adapters.

    Values count, not their dtype: a bf16 checkpoint gives the same in bf16 and in fp32. Offloaded weights are read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        with _loaded(module):
            own = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
            for full_name, tensor in own:
                digest.update(f"{full_name} {tuple(tensor.shape)} ".encode() + _digest(tensor))
    digest.update(repr([(name, one) for name, one in _adapters(model)]).encode())
    return digest.hexdigest()


def pictures_digest(pixel_values: Tensor | None) -> bytes:
    """Tells the pictures of one call of `chat` from those of another."""
    if pixel_values is None or not len(pixel_values):
        return b""
    return hashlib.blake2b(pixel_values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).digest()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a quantised tensor that wraps others
        return id(tensor)


def _adapters(model: nn.Module) -> Iterator[tuple]:
    """What PEFT's layers say of themselves: which adapters run, which are merged, how strongly they count."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            active = () if module.disable_adapters else tuple(module.active_adapters)
            scaling = tuple(sorted((getattr(module, "scaling", None) or {}).items()))
            yield name, (active, tuple(getattr(module, "merged_adapters", ())), scaling)


def _loaded(module: nn.Module):
    """Within it, weights that Accelerate keeps on a disk or elsewhere are there."""
    if getattr(module, "_hf_hook", None) is None:
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _digest(tensor: Tensor) -> bytes:
    """Of a tensor's values: floats count as fp32 or, if that is not enough, fp64."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # a quantised tensor: of the tensors it wraps
        return b"".join(_digest(getattr(tensor, name)) for name in names)
    flat, digest = tensor.detach().flatten(), hashlib.blake2b(digest_size=16)
    for piece in flat.split(PIECE):
        if piece.is_floating_point():
            piece = piece.double() if piece.dtype == torch.float64 else piece.float()
        digest.update(memoryview(piece.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.digest()
