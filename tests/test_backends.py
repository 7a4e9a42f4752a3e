"""Which backend runs, and what is said where the fastest cannot."""

import ast
import logging
import sys
from pathlib import Path

import pytest
import torch

from mmmamba import backends_mmmamba
from mmmamba.backends_mmmamba import BACKENDS, ENVIRONMENT, backend, find, unavailable_reason
from mmmamba.ssm_mmmamba import TORCH


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """Choices and warnings are made once per process."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)

    def forget():
        for cached in (find, backends_mmmamba._backend, type(backends_mmmamba.logger).warning_once):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def warnings(monkeypatch):
    """What the package's logger says."""
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


def test_a_broken_triton_is_named_once_and_another_backend_runs(broken_triton, warnings):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert backend(torch.device("cuda"), dtype).name == "torch"
    (message,) = warnings
    assert "triton backend cannot be imported: libcuda.so.1: undefined symbol" in message
    assert "run on the torch backend" in message


def test_where_triton_would_not_run_nothing_is_said_about_it(broken_triton, warnings):
    assert backend(torch.device("cpu")).name == "torch"
    assert backend(torch.device("cuda"), torch.float64).name == "torch"
    assert backend(torch.device("cuda"), requested="torch").name == "torch"
    assert warnings == []


def test_a_broken_triton_that_was_asked_for_is_an_error_with_the_reason(broken_triton):
    with pytest.raises(ValueError, match=r"triton backend cannot be imported: libcuda.*ssm_implementation='auto'"):
        backend(torch.device("cuda"), requested="triton")


def test_the_reference_runs_on_a_cpu_and_in_double_precision():
    assert backend(torch.device("cpu")) is TORCH
    assert backend(torch.device("cuda"), torch.float64) is TORCH
    assert "the tensors are on cpu" in unavailable_reason("cuda", "cpu", torch.float32)
    assert "the tensors are torch.float64" in unavailable_reason("triton", "cuda", torch.float64)


def test_the_environment_overrides_the_config(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert backend(torch.device("cuda"), requested="triton") is TORCH


def test_unknown_and_impossible_requests_are_refused_in_words(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"ssm_implementation='metal' is unknown; use auto, torch, triton, cuda"):
        backend(torch.device("cpu"), requested="metal")
    with pytest.raises(ValueError, match=r"triton backend runs on CUDA devices, and the tensors are on cpu"):
        backend(torch.device("cpu"), requested="triton")


def test_backends_offer_the_same_operations():
    for found, reason in map(find, BACKENDS):
        if found is None:
            assert "cannot be imported" in reason
            continue
        assert all(callable(operation) for operation in found[1:-1])
        assert (found.decode_step is None) == (found is TORCH)


def test_kernels_import_the_reference_and_never_the_other_way():
    allowed = {"ssm": set(), "triton": {"ssm"}, "cuda": {"ssm"}, "backends": {"ssm", "triton", "cuda"}}
    for name, below in allowed.items():
        source = Path(backends_mmmamba.__file__).with_name(f"{name}_mmmamba.py").read_text(encoding="utf-8")
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
        assert {node.module.removesuffix("_mmmamba") for node in imports} == below, name
