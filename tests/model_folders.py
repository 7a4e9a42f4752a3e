"""Copies of shipped models with their code, as on the Hub, and a temporary cache to load remote code from."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mmmamba
from mmmamba.conversion.package_code import self_contained


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"


def self_contained_copy(name: str, destination: Path) -> Path:
    """A new folder with a shipped model ("teacher", "linear" or "hybrid") and the code that it needs."""
    destination.mkdir(parents=True)
    for file, content in self_contained({path.name: path for path in (SHAPES / name).iterdir()}).items():
        (destination / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return destination


@contextmanager
def modules_cache(folder: Path) -> Iterator[None]:
    """Lets Transformers load the code of models from this folder instead of the user's cache."""
    before = {name: sys.modules.pop(name) for name in _remote_modules()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        importlib.invalidate_caches()
        yield
    for name in _remote_modules():
        del sys.modules[name]
    sys.modules.update(before)


def _remote_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
