"""Copies of the shipped models as they are on the Hub, where a folder holds its code."""

from pathlib import Path

import mmmamba
from mmmamba.conversion.package_code import self_contained


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"


def self_contained_copy(name: str, destination: Path) -> Path:
    """A new folder with a shipped model ("teacher", "linear" or "hybrid") and the code that it needs."""
    destination.mkdir(parents=True)
    for file, content in self_contained({path.name: path for path in (SHAPES / name).iterdir()}).items():
        (destination / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return destination
