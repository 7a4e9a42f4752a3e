"""What may change between two starts of a run, and what of a recipe has changed.

A key that no weight depends on may always change: names, how often something is saved, and what only moves memory
against time. Paths are compared as the files they lead to, not as they are spelt.
"""

import dataclasses
import glob
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .recipe import Recipe, Stage, resolve_path


# Keys that no weight depends on, up to rounding.
KEYS_WITHOUT_EFFECT = {
    "output",
    "name",
    "bad_share",
    "workers",
    "save_every",
    "log_every",
    "evaluate",
    "base_model",
    "attn_implementation",
}
STAGE_KEYS_WITHOUT_EFFECT = {"per_device_batch_size", "logits_chunk", "gradient_checkpointing"}
# Keys that the seeded student depends on.
SEEDING_KEYS = {"teacher", "attention_layers", "num_attention", "strategy", "initialization", "seed"}


def changed_keys(old: Recipe, new: Recipe, ignore: Collection[str] = ()) -> list[str]:
    """Keys that affect the weights and differ between two recipes, a stage's with a dot (`stage_3.steps`).

    Args:
        old: The recorded recipe, see `with_absolute_paths`. A path in it that leads nowhere any more is taken for one
            that was moved, and not compared.
        new: The recipe to go on with.
        ignore: Keys to leave out; `stage_3` leaves out all of its keys.
    """
    changed = []
    for entry in dataclasses.fields(Recipe):
        if entry.name in KEYS_WITHOUT_EFFECT or entry.name in ignore:
            continue
        before, now = getattr(old, entry.name), getattr(new, entry.name)
        if isinstance(before, Stage) and isinstance(now, Stage):
            without_effect = STAGE_KEYS_WITHOUT_EFFECT
            if any(getattr(stage, "on_policy", 0) for stage in (before, now)):  # answers are drawn by micro-batch
                without_effect = without_effect - {"per_device_batch_size"}
            changed += [
                f"{entry.name}.{key.name}"
                for key in dataclasses.fields(before)
                if key.name not in without_effect
                and not _is_same(key.name, getattr(before, key.name), getattr(now, key.name))
            ]
        elif not _is_same(entry.name, before, now):
            changed.append(entry.name)
    return changed


def moved_paths(old: Recipe, new: Recipe) -> dict[str, str]:
    """Recorded paths that lead nowhere any more, and those that stand in their places now."""
    pairs = zip(_all_paths(with_absolute_paths(old)), _all_paths(with_absolute_paths(new)), strict=False)
    return {before: now for before, now in pairs if before != now and not _exists(before)}


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with the same files under absolute paths, so that it can be compared from any working directory."""
    stage_4 = recipe.stage_4
    if stage_4 is not None:
        stage_4 = dataclasses.replace(stage_4, data=_map_paths(stage_4.data, _absolute))
    return dataclasses.replace(
        recipe,
        stage_4=stage_4,
        teacher=_absolute(recipe.teacher),
        output=_absolute(recipe.output),
        data=_map_paths(recipe.data, _absolute),
        held_out=_map_paths(recipe.held_out, _absolute),
    )


def _all_paths(recipe: Recipe) -> list[str]:
    found = [recipe.teacher]
    for entries in (recipe.data, recipe.held_out, recipe.stage_4 and recipe.stage_4.data):
        _map_paths(entries, lambda path: found.append(path) or path)
    return found


def _is_same(name: str, before: Any, now: Any) -> bool:
    if name == "teacher":
        return _same_path(before, now)
    if name not in ("data", "held_out"):
        return before == now
    paths: list[list[str]] = [[], []]
    for found, value in zip(paths, (before, now), strict=True):
        _map_paths(value, lambda path, found=found: found.append(path) or path)
    # The same but for its paths, and these lead to the same files, one by one.
    same_entries = _map_paths(before, lambda _: "") == _map_paths(now, lambda _: "")
    return same_entries and len(paths[0]) == len(paths[1]) and all(map(_same_path, *paths))


def _same_path(before: str, now: str) -> bool:
    return _absolute(before) == _absolute(now) or not _exists(before)


def _exists(path: str) -> bool:
    found = _absolute_path(path)
    return found.exists() or bool(glob.glob(str(found)))  # a pattern such as data/*.parquet


def _absolute_path(path: str) -> Path:
    return resolve_path(path).resolve()


def _absolute(path: str) -> str:
    return path if path.startswith("mmmamba:") else str(_absolute_path(path))


def _map_paths(entries: Any, change) -> Any:
    """Entries of `data` with `change` applied to every local path: of files, roots and a builder's data files."""
    if not isinstance(entries, list):
        return entries
    return [_map_entry(entry, change) if isinstance(entry, dict) else entry for entry in entries]


def _map_entry(entry: dict[str, Any], change) -> dict[str, Any]:
    changed = dict(entry)
    # Files of a repository ("org/name") are named within it; builders such as "json" read local ones.
    builders = ["data_files", "data_dir"] if "/" not in str(entry.get("dataset", "/")) else []
    for key in ("file", "root", "documents", *builders):
        if key in entry:
            changed[key] = _map_value(entry[key], change)
    return changed


def _map_value(value: Any, change) -> Any:
    if isinstance(value, dict):
        return {key: _map_value(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_map_value(inner, change) for inner in value]
    return change(value) if isinstance(value, str) and "://" not in value else value
