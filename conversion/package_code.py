"""Model folders without code of their own: a small module imports it from the installed package.

The trained models in `examples/shapes/` ship with the package, so they need no copy of its modules: their `auto_map`
entries name `mmmamba_code.py`, which imports the classes from `mmmamba`. A folder that leaves the package, such as one
that `mmmamba push` uploads or that `save_pretrained` writes, holds the modules themselves.
"""

import re
from pathlib import Path

import mmmamba


PACKAGE = Path(mmmamba.__file__).resolve().parent
MODULE = "mmmamba_code"
CLASSES = {
    "configuration_mmmamba": ["MmMambaConfig"],
    "image_processing_mmmamba": ["MmMambaImageProcessor", "MmMambaImageProcessorPil"],
    "modeling_mmmamba": ["MmMambaForConditionalGeneration"],
    "processing_mmmamba": ["MmMambaProcessor"],
    "tokenization_mmmamba": ["MmMambaTextTokenizer", "MmMambaTokenizer", "MmMambaTokenizerFast"],
    "video_processing_mmmamba": ["MmMambaVideoProcessor"],
}
SOURCE = '"""The code of this model is that of the package `mmmamba`, which must be installed."""\n\n' + "".join(
    f"from mmmamba.{module} import {', '.join(names)}\n" for module, names in CLASSES.items()
)


def import_from_package(folder: Path) -> None:
    """Replaces the modules in a model folder by one that imports them from the package."""
    for module in folder.glob("*_mmmamba.py"):
        module.unlink()
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        for module, names in CLASSES.items():
            text = re.sub(rf'"{module}\.({"|".join(names)})"', rf'"{MODULE}.\1"', text)
        file.write_text(text, encoding="utf-8")


def name_modules(text: str) -> str:
    """The text of a JSON file whose `auto_map` names the package's modules and no longer `mmmamba_code`."""
    for module, names in CLASSES.items():
        text = re.sub(rf'"{MODULE}\.({"|".join(names)})"', rf'"{module}.\1"', text)
    return text


def self_contained(files: dict[str, Path]) -> dict[str, Path | bytes]:
    """The files of a model folder with the package's modules in place of `mmmamba_code.py`, if that is among them.

    Args:
        files: Path relative to the folder, to file.

    Returns:
        The same for the folder as it loads without the package; changed files as their new content.
    """
    if f"{MODULE}.py" not in files:
        return dict(files)
    complete: dict[str, Path | bytes] = {name: path for name, path in files.items() if name != f"{MODULE}.py"}
    for name, path in files.items():
        if name.endswith(".json") and "/" not in name:
            complete[name] = name_modules(path.read_text(encoding="utf-8")).encode()
    return complete | {module.name: module for module in PACKAGE.glob("*_mmmamba.py")}
