"""Fixtures that several test files share."""

import contextlib
import logging
import os

import pytest
import setuptools  # noqa: F401  # before anything imports distutils, which setuptools (for quanto) wants to replace
import torch


# Without a GPU kernels run in Triton's interpreter. Triton reads the variable when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # Triton may be missing
        import quick_interpreter

        quick_interpreter.install()

from conversations import processor_with
from tiny_models import LAYER_TYPES, tiny_model
from transformers.utils import logging as transformers_logging

from mmmamba import quantization_mmmamba as quantization
from mmmamba.conversion.convert import chat_template
from mmmamba.conversion.distillation.data import ConversationEncoder


@pytest.fixture(scope="session", params=list(LAYER_TYPES))
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def processor():
    return processor_with(chat_template("internlm2-chat"))


@pytest.fixture(scope="module")
def encoder(processor):
    return ConversationEncoder(processor)


class _DeprecationRecorder(logging.Handler):
    """Records Transformers' deprecation messages, most of which are logged once instead of raised as warnings."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if "deprecated" in (message := record.getMessage()):
            self.messages.append(message)


_deprecations = _DeprecationRecorder()
logging.getLogger("transformers").addHandler(_deprecations)


@pytest.fixture(autouse=True)
def no_deprecation_messages(request):
    """Fails a test in which Transformers logs a deprecation, unless it is marked `deprecations`."""
    _deprecations.messages.clear()
    transformers_logging.warning_once.cache_clear()  # said once for each test, not for each process
    yield
    if request.node.get_closest_marker("deprecations") is None:
        assert not _deprecations.messages


@pytest.fixture(params=["C", "torch"])
def kernels(request, monkeypatch):
    """Products by this package's kernels, and by those of torch where these cannot be compiled."""
    if request.param == "torch":
        monkeypatch.setattr(quantization, "kernels", lambda: None)
    elif quantization.kernels() is None:
        pytest.skip("there is no C compiler")
    return request.param
