"""Transformers' own common model tests, from the source distribution of the installed version.

The distribution leaves out some modules that the suite imports; empty mixins stand in for them.
"""

import importlib
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import transformers


CACHE = Path(__file__).parent / ".transformers_suite"
PACKAGE = "transformers_suite_tests"
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def _unpacked() -> Path:
    """The suite's folder; downloaded once per version."""
    version = transformers.__version__
    folder = CACHE / f"transformers-{version}" / "tests"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run(
            [*download, "--dest", str(CACHE), f"transformers=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(
                f"the source distribution of transformers {version}, which holds the suite, cannot be downloaded: "
                f"{done.stderr.strip().splitlines()[-1:]}",
                allow_module_level=True,
            )
        (archive,) = CACHE.glob(f"transformers-{version}.tar.gz")
        with tarfile.open(archive) as files:
            members = [m for m in files.getmembers() if m.name.startswith(f"transformers-{version}/tests/")]
            files.extractall(CACHE, members, filter="data")
    return folder


def mixins() -> tuple[type, type]:
    """`ModelTesterMixin` of the installed version, and the stand-in for `GenerationTesterMixin`."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(_unpacked())]
    sys.modules[PACKAGE] = package
    for name, mixin in LEFT_OUT.items():
        parent = types.ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
        parent.__path__ = []
        module = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules |= {parent.__name__: parent, module.__name__: module}
    suite = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    return suite.ModelTesterMixin, suite.GenerationTesterMixin
