"""mamba_ssm's own Triton kernels in the interpreter, from its source distribution; the compiled parts stand aside.

Its package imports CUDA extensions, and its autotuner times candidates on a GPU: here the modules load one by one, and
the first candidate is taken. causal_conv1d is CUDA only, so the reference convolution stands in for it.
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


class First:
    """A kernel with the first of its candidates."""

    def __init__(self, kernel, configs):
        self.kernel, self.configs, self.best_config = kernel, configs, configs[0]

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = self.best_config.all_kwargs() | kwargs
            if self.best_config.pre_hook is not None:  # sets to zero what the kernel adds to
                self.best_config.pre_hook(dict(zip(self.kernel.arg_names, args, strict=False)) | options)
            return self.kernel[lambda meta: grid(meta | options) if callable(grid) else grid](*args, **options)

        return launch


def causal_conv1d_fn(x, weight, bias, initial_states, activation):
    """(B, C, L) to the same; the semantics of causal_conv1d's documentation."""
    assert activation == "silu" and x.stride(1) == 1 and initial_states.stride(1) == 1
    return F.silu(F.conv1d(torch.cat([initial_states, x], 2), weight[:, None], bias, groups=len(weight)))


def causal_conv1d_update(x, conv_state, weight, bias, activation):
    """(B, C) to the same; `conv_state` (B, C, W - 1) moves on in place."""
    window = torch.cat([conv_state, x[..., None]], 2)
    conv_state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1) + bias)


def install(monkeypatch) -> None:
    """Makes `mamba_ssm.ops.triton` and `causal_conv1d` importable; skips where the source cannot be had.

    On a GPU with both installed, they are what is tested.
    """
    if torch.cuda.is_available() and all(map(importlib.util.find_spec, ("mamba_ssm", "causal_conv1d"))):
        return  # the packages themselves
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
        monkeypatch.setattr(triton, "autotune", lambda configs, key, **_: lambda kernel: First(kernel, configs))
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        processors = types.SimpleNamespace(multi_processor_count=8)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    importlib.invalidate_caches()
