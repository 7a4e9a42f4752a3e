"""Upstream checkpoint folders made of the golden fixtures."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


GOLDEN = Path(__file__).parent / "golden"


def checkpoint(folder: Path, name: str) -> Path:
    """A folder with one fixture's config and weights, as somebody would have downloaded it."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / name / "config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / name / "state.safetensors", folder / "model.safetensors")
    return folder


def change_weights(folder: Path, change) -> None:
    """Rewrites a single-file checkpoint after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def training_layers(*files: str) -> dict[str, dict[str, torch.Tensor]]:
    """Mixers of the training student, by upstream layer, from fixture files of `seeding`; later files win."""
    layers = {}
    for file in files:
        for name, tensor in load_file(GOLDEN / "seeding" / file).items():
            layer, parameter = name.split(".attention.")
            layers.setdefault(layer, {})[parameter] = tensor
    return layers
