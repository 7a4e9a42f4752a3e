"""The files of a Space on the Hugging Face Hub: a page that shows a model, for `mmmamba push --space`.

A Space has none of this package but two files. The code of the model comes with the model.
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import SpaceCardData
from packaging.specifiers import SpecifierSet
from packaging.version import Version


PACKAGE = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
GRADIO, RUNS_WITH = "6.31.0", SpecifierSet(">=6.31,<7")  # tested; and which versions can run app.py
# Of these the versions that are installed here are named, since they go together; of others what pyproject.toml asks.
EXACT = {"torch": ">=2.7", "torchvision": ">=0.22", "transformers": ">=5.17,<6"}
OTHERS = {
    "av": ">=15",
    "jinja2": ">=3.1",
    "numpy": ">=1.26",
    "pillow": ">=11",
    "protobuf": ">=5",
    "safetensors": ">=0.5",
    "sentencepiece": ">=0.2",
    "tokenizers": ">=0.22",
}
CARD = """---
{metadata}
---

# {title}

A page to show pictures, videos and texts to [{model}](https://huggingface.co/{model}) and to ask about them. Made by
`mmmamba push --space`; the model is named in `app.py`, or by the variable `MMMAMBA_MODEL` in the Space's settings.
"""


def space_files(model: str, license: str | None = "mit") -> dict[str, Path | bytes]:
    """What a Space needs to show a model.

    Args:
        model: Name of the model on the Hub.
        license: Of the model.

    Returns:
        Path in the Space, to the file or its content.
    """
    return {
        "README.md": _card(model, license).encode(),
        "app.py": _page(model).encode(),
        "app_sessions.py": PACKAGE / "app_sessions.py",
        "picture.png": PACKAGE / "examples" / "shapes" / "picture.png",
        "requirements.txt": "".join(f"{line}\n" for line in _requirements()).encode(),
    }


def _page(model: str) -> str:
    """`app.py` with the model's name, and without a package around it."""
    text = (PACKAGE / "app.py").read_text(encoding="utf-8").replace("from .app_sessions", "from app_sessions")
    return text.replace('"examples/shapes/hybrid"', json.dumps(model))


def _card(model: str, license: str | None) -> str:
    title = f"{model.split('/')[1]} with mmMamba"
    metadata = SpaceCardData(
        title=title,
        license=license,
        sdk="gradio",
        sdk_version=found if (found := _installed("gradio")) and found in RUNS_WITH else GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        models=[model],
        emoji="🐍",
        colorFrom="green",
        colorTo="gray",
        short_description="Pictures, videos and long texts in constant memory",
    )
    return CARD.format(metadata=metadata.to_yaml().strip(), title=title, model=model)


def _requirements() -> list[str]:
    exact = {name: f"=={found}" if (found := _installed(name)) else asked for name, asked in EXACT.items()}
    return sorted(f"{name}{asked}" for name, asked in (exact | OTHERS).items())


def _installed(name: str) -> str | None:
    """The version here, if it is a release; without a local part such as +cu130, which PyPI has not."""
    try:
        found = Version(version(name))
    except PackageNotFoundError:
        return None
    return None if found.is_prerelease else found.public
