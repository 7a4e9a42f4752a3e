"""Transformers' own common tests, from the source distribution of the installed version.

The distribution lacks some modules that the suite imports; they are replaced by empty mixins. Files that it would
fetch from the Hub are made here.
"""

import importlib
import itertools
import os
import sys
import tempfile
import types
from functools import cache
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from source_distributions import unpacked

from mmmamba.examples.shapes.clip import pictures, write_clip


FRAMES = 11  # of clips, as in the one that the suite samples frames of
PACKAGE = "transformers_suite_tests"
MISSING_MODULES = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def suite(module: str):
    """A module of the suite, such as `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        tests = unpacked("transformers", transformers.__version__) / "tests"
        os.environ["TRANSFORMERS_TEST_FIXTURE_DIR"] = str(tests / "fixtures")
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(tests)]
        sys.modules[PACKAGE] = package
        for name, mixin in MISSING_MODULES.items():
            parent = types.ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
            parent.__path__ = []
            missing = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(missing, mixin, type(mixin, (), {}))
            sys.modules |= {parent.__name__: parent, missing.__name__: missing}
        hub = types.ModuleType("fetch_hub_objects_for_ci")
        hub.url_to_local_path = local_file
        sys.modules[hub.__name__] = hub
    return importlib.import_module(f"{PACKAGE}.{module}")


def mixins() -> tuple[type, type]:
    """`ModelTesterMixin` of the installed version, and an empty `GenerationTesterMixin`."""
    common = suite("test_modeling_common")
    return common.ModelTesterMixin, common.GenerationTesterMixin


@cache
def local_file(url: str) -> str:
    """A picture or a clip for the address of one; other addresses as they are, for tests that are skipped."""
    name = Path(url)
    file = Path(tempfile.mkdtemp()) / name.name
    if name.suffix == ".mp4":
        write_clip(file, itertools.islice(pictures(), FRAMES))
        return str(file)
    if name.suffix not in (".png", ".jpg", ".jpeg"):
        return url
    pixels = np.random.default_rng(len(url)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((400, 300)).save(file)
    return str(file)
