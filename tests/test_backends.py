"""The backend that runs, and the warning or error if the fastest or the requested one cannot."""

import ast
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, token_ids

from mmmamba import backends_mmmamba, modeling_mmmamba
from mmmamba.backends_mmmamba import (
    BACKENDS,
    ENVIRONMENT,
    backend,
    find,
    project,
    unavailable_reason,
    without_cudnn_attention,
)
from mmmamba.configuration_mmmamba import MmMambaTextConfig
from mmmamba.ssm_mmmamba import TORCH


@pytest.fixture(autouse=True)
def clear_caches(monkeypatch):
    """Forgets the choice of a backend and which warnings were given, both cached per process."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)

    def clear():
        for cached in (
            backends_mmmamba._imported,
            backends_mmmamba._backend,
            type(backends_mmmamba.logger).warning_once,
        ):
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the package's logger."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    backends_mmmamba.logger.addHandler(handler)
    yield messages
    backends_mmmamba.logger.removeHandler(handler)


@pytest.fixture
def broken_triton(monkeypatch):
    """Triton is installed, and fails at import with something other than an ImportError; mamba_ssm is not there."""

    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "mmmamba.triton_mmmamba":
                raise OSError("libcuda.so.1: undefined symbol")

    monkeypatch.setitem(sys.modules, "mmmamba.cuda_mmmamba", None)
    monkeypatch.delitem(sys.modules, "mmmamba.triton_mmmamba", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])


def test_a_broken_triton_is_warned_about_once_and_another_backend_runs(broken_triton, warnings):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert backend(torch.device("cuda"), dtype).name == "torch"
    (message,) = warnings
    assert "triton backend cannot be imported: libcuda.so.1: undefined symbol" in message
    assert "run on the torch backend" in message


def test_a_broken_triton_is_not_warned_about_where_it_would_not_run(broken_triton, warnings):
    assert backend(torch.device("cpu")).name in ("cpu", "torch")
    assert backend(torch.device("cuda"), torch.float64).name == "torch"
    assert backend(torch.device("cuda"), requested="torch").name == "torch"
    assert warnings == []


def test_requesting_a_broken_triton_is_an_error_with_the_reason(broken_triton):
    with pytest.raises(ValueError, match=r"triton backend cannot be imported: libcuda.*ssm_implementation='auto'"):
        backend(torch.device("cuda"), requested="triton")


def test_the_torch_backend_runs_on_a_cpu_and_in_double_precision():
    assert backend(torch.device("cpu"), requested="torch") is TORCH
    assert backend(torch.device("cpu"), torch.float64) is TORCH
    assert backend(torch.device("cuda"), torch.float64) is TORCH
    assert "the tensors are on cpu" in unavailable_reason("cuda", "cpu", torch.float32)
    assert "the tensors are torch.float64" in unavailable_reason("triton", "cuda", torch.float64)


def test_the_environment_variable_overrides_the_config(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert backend(torch.device("cuda"), requested="triton") is TORCH


def test_requesting_an_unknown_or_unavailable_backend_is_an_error_that_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"ssm_implementation='metal' is unknown; use auto, torch, cpu, triton, cuda"):
        backend(torch.device("cpu"), requested="metal")
    with pytest.raises(ValueError, match=r"triton backend runs on CUDA devices, and the tensors are on cpu"):
        backend(torch.device("cpu"), requested="triton")


def test_backends_offer_the_same_operations():
    for found, reason in map(find, BACKENDS):
        if found is None:
            assert "cannot be imported" in reason or "has no kernels" in reason
            continue
        assert all(callable(operation) for operation in found[1:-1])
        assert (found.decode_step is None) == (found is TORCH)


def test_kernel_files_import_the_reference_and_it_imports_none_of_them():
    allowed = {
        "ssm": set(), "triton": {"ssm"}, "cuda": {"ssm"}, "cpu_kernels": set(), "cpu": {"ssm", "cpu_kernels"},
        "backends": {"ssm", "cpu", "triton", "cuda"},
    }  # fmt: skip
    for name, below in allowed.items():
        source = Path(backends_mmmamba.__file__).with_name(f"{name}_mmmamba.py").read_text(encoding="utf-8")
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
        assert {node.module.removesuffix("_mmmamba") for node in imports} == below, name


class Quantised(torch.Tensor):
    """A weight of a class of its own, as quantisation tools have them."""


def hook(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(layer):
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.out_features)


def quantise(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize("change", [lambda layer: None, hook, replace_forward, quantise])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (2, 3, 24)])
@torch.no_grad()
def test_a_projection_is_what_the_layer_gives_whatever_was_done_to_it(change, shape):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 36, bias=False), torch.randn(shape)
    change(layer)
    torch.testing.assert_close(project(layer, x), layer(x))
    torch.testing.assert_close(torch.func.vmap(lambda x: project(layer, x))(x[None]), layer(x)[None])


@torch.no_grad()
def test_without_kernels_a_single_row_is_multiplied_in_slices(monkeypatch):
    """Else the fast way would be dead code that no comparison misses."""
    monkeypatch.setattr(backends_mmmamba, "kernels", lambda: None)
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: products.append(1) or bmm(*args))
    layer = torch.nn.Linear(24, 36, bias=False)
    project(layer, torch.randn(1, 1, 24))
    assert len(products) == 1
    for x in (torch.randn(1, 2, 24), torch.randn(1, 1, 24, dtype=torch.float64)):
        project(layer.to(x.dtype), x)
    hook(layer.float())
    project(layer, torch.randn(1, 1, 24))
    assert len(products) == 1


def test_cudnn_attention_is_left_out_in_inference_on_a_gpu_only():
    enabled, gpu = torch.backends.cuda.cudnn_sdp_enabled, torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(True)
    with torch.no_grad(), without_cudnn_attention(gpu):
        assert not enabled()
    with without_cudnn_attention(gpu):  # training
        assert enabled()
    with torch.no_grad(), without_cudnn_attention(torch.device("cpu")):
        assert enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # a user's choice stays
    with torch.no_grad(), without_cudnn_attention(gpu):
        assert not enabled()
    assert not enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_attention_layers_leave_cudnn_out(monkeypatch):
    devices = []
    monkeypatch.setattr(
        modeling_mmmamba, "without_cudnn_attention", lambda device: nullcontext(devices.append(device.type))
    )
    with torch.no_grad():
        tiny_model("hybrid")(token_ids(5, seed=0)[None])
    assert devices == ["cpu"] * tiny_model("hybrid").config.text_config.layer_types.count("full_attention")


def test_a_config_may_name_every_backend():
    for name in ("auto", *BACKENDS):
        assert MmMambaTextConfig(ssm_implementation=name).ssm_implementation == name
