"""Transformers' own common model tests, from the source distribution of the installed version.

The distribution lacks some modules that the suite imports; they are replaced by empty mixins.
"""

import importlib
import sys
import types

import transformers
from source_distributions import unpacked


PACKAGE = "transformers_suite_tests"
MISSING_MODULES = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def mixins() -> tuple[type, type]:
    """`ModelTesterMixin` of the installed version, and an empty `GenerationTesterMixin`."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(unpacked("transformers", transformers.__version__) / "tests")]
    sys.modules[PACKAGE] = package
    for name, mixin in MISSING_MODULES.items():
        parent = types.ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
        parent.__path__ = []
        module = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules |= {parent.__name__: parent, module.__name__: module}
    suite = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    return suite.ModelTesterMixin, suite.GenerationTesterMixin
