"""mamba_ssm's Triton kernels, run by the interpreter, from its source distribution without its CUDA extensions.

The package imports CUDA extensions and its autotuner times configurations on a GPU, so modules are imported one by
one, and the first configuration is used. causal_conv1d is CUDA only and replaced by a reference convolution.
"""

import contextlib
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
import triton
from source_distributions import unpacked


VERSION = "2.3.2.post1"


class FirstConfig:
    """Replaces Triton's autotuner: runs a kernel with the first of its configurations."""

    def __init__(self, kernel, configs):
        self.kernel, self.configs, self.best_config = kernel, configs, configs[0]

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = self.best_config.all_kwargs() | kwargs
            if self.best_config.pre_hook is not None:  # zeroes the tensors that the kernel adds to
                self.best_config.pre_hook(dict(zip(self.kernel.arg_names, args, strict=False)) | options)
            return self.kernel[lambda meta: grid(meta | options) if callable(grid) else grid](*args, **options)

        return launch


def causal_conv1d_fn(x, weight, bias, initial_states, activation):
    """(B, C, L) to (B, C, L), as causal_conv1d documents it."""
    assert activation == "silu" and x.stride(1) == 1 and initial_states.stride(1) == 1
    return F.silu(F.conv1d(torch.cat([initial_states, x], 2), weight[:, None], bias, groups=len(weight)))


def causal_conv1d_update(x, conv_state, weight, bias, activation):
    """(B, C) to (B, C); updates `conv_state` (B, C, W - 1) in place."""
    window = torch.cat([conv_state, x[..., None]], 2)
    conv_state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1) + bias)


def install(monkeypatch) -> None:
    """Makes `mamba_ssm.ops.triton` and `causal_conv1d` importable; skips if the source cannot be downloaded.

    On a GPU with both packages installed, it changes nothing.
    """
    if torch.cuda.is_available() and all(map(importlib.util.find_spec, ("mamba_ssm", "causal_conv1d"))):
        return
    folder = unpacked("mamba_ssm", VERSION, MAMBA_SKIP_CUDA_BUILD="TRUE")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        monkeypatch.setitem(sys.modules, name, package)
    conv = types.ModuleType("causal_conv1d")
    conv.causal_conv1d_fn, conv.causal_conv1d_update = causal_conv1d_fn, causal_conv1d_update
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    monkeypatch.setitem(sys.modules, "causal_conv1d.cpp_functions", None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton, "autotune", lambda configs, key, **_: lambda kernel: FirstConfig(kernel, configs))
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        processors = types.SimpleNamespace(multi_processor_count=8)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    importlib.invalidate_caches()
