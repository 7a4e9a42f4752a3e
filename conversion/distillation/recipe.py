"""Recipes: what a distillation run does, as a YAML file with strict keys.

    recipe = load_recipe("shapes-linear", ["stage_3.steps=100", "output=runs/mine"])

Paths are relative to the working directory; `mmmamba:` at their start stands for the package's folder.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mmmamba.conversion.publish import PACKAGE
from mmmamba.conversion.shards import write_text


RECIPES = Path(__file__).with_name("recipes")
INITIALIZATIONS = ("mimic", "inherited", "scratch")
STRATEGIES = ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked", "measured")
MOST_VALUES = 100_000  # of a recipe
TRAINABLE = ("mixers", "mixers+o_proj", "decoder")


@dataclass(frozen=True)
class Stage:
    """A stage's schedule: warmup, stable, decay (WSD), with AdamW.

    Args:
        steps: Optimiser steps.
        learning_rate: Of the stable part.
        warmup: Steps in which the learning rate rises from 0.
        decay: Steps at the end in which it falls to `min_lr_ratio * learning_rate`.
        batch_size: Conversations per step, over all processes and accumulated micro-batches.
        per_device_batch_size: Conversations per micro-batch of a process.
        min_lr_ratio: See `decay`.
        include_padding: Whether losses are means over padding, too, as they are upstream.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    decay: int = 0
    batch_size: int = 32
    per_device_batch_size: int = 32
    min_lr_ratio: float = 0.0
    include_padding: bool = False

    def __post_init__(self):
        for name in ("steps", "learning_rate", "batch_size", "per_device_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0.")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and decay={self.decay} do not fit into steps={self.steps}; make their sum "
                "smaller."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must lie between 0 and 1.")


@dataclass(frozen=True)
class EndToEndStage(Stage):
    """Stage 3's schedule and loss.

    Args:
        trainable: What trains: `mixers` (as published), `mixers+o_proj` (their output projections, too), or `decoder`
            (all layers with MLPs and norms, and the attention layers of a hybrid).
        temperature: Softens both distributions.
        hard_weight: Weight of the answers' cross entropy beside the KL divergence.
        answers_only: Whether the KL divergence counts only where an answer's token is predicted.
        gradient_checkpointing: Recompute each layer's activations in the backward pass instead of storing them.
        logits_chunk: Positions whose logits exist at once.
    """

    trainable: str = "mixers"
    temperature: float = 1.0
    hard_weight: float = 0.0
    answers_only: bool = False
    gradient_checkpointing: bool = False
    logits_chunk: int = 512

    def __post_init__(self):
        super().__post_init__()
        _check_choice("trainable", self.trainable, TRAINABLE)
        if self.temperature <= 0 or self.hard_weight < 0 or self.logits_chunk < 1:
            raise ValueError(
                f"temperature={self.temperature} must be above 0, hard_weight={self.hard_weight} at least 0 and "
                f"logits_chunk={self.logits_chunk} at least 1."
            )


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Args:
        teacher: Model folder whose layers are all attention.
        output: Folder of the run, which is resumed if it exists.
        data: Sources of conversations, see `mmmamba.conversion.distillation.data.open_data`.
        name: What the student is called; the output folder's name if not given.
        attention_layers: Layers that stay attention.
        num_attention: Or how many, placed by `strategy`. With neither key the student is linear.
        strategy: One of the published placements, or `measured`: the layers whose Mamba-2 replacement costs most.
        measure_batches: Batches of stage 3's `batch_size` on which `measured` measures.
        held_out: Sources of conversations to measure on, which no stage trains on; the picture world has its own.
        initialization: `mimic` as published; `inherited` without the parameters that mimic linear attention; `scratch`
            without queries, keys and values, too.
        seed: Of new parameters, data order and all else that is random.
        stages: Which of 1, 2 and 3 run.
        stage_1, stage_2, stage_3: Their schedules.
        betas: AdamW's.
        weight_decay: On matrices and convolutions.
        clip: Largest gradient norm; 0 for none.
        attn_implementation: Of the attention layers; Transformers' own choice if not given.
        precision: `bf16` (autocast) or `fp32`.
        dtype: Of the exported weights.
        teacher_dtype: Of the teacher's weights while it runs.
        max_tokens: Longer conversations are bad rows.
        packing: Several conversations in one row, without padding.
        bad_share: Largest share of bad rows.
        workers: DataLoader workers per process.
        save_every: Steps between checkpoints.
        log_every: Steps between entries of the logs.
        evaluate: Held-out questions of the picture world that the student answers at the end; 0 for none.
        base_model: Name on the Hub of the model that the student comes from, for its card.
    """

    teacher: str
    output: str
    data: list
    name: str | None = None
    attention_layers: list[int] | None = None
    num_attention: int | None = None
    strategy: str | None = None
    measure_batches: int = 4
    held_out: list | None = None
    initialization: str = "mimic"
    seed: int = 0
    stages: list[int] = field(default_factory=lambda: [1, 2, 3])
    stage_1: Stage | None = None
    stage_2: Stage | None = None
    stage_3: EndToEndStage | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    clip: float = 5.0
    attn_implementation: str | None = None
    precision: str = "bf16"
    dtype: str = "bfloat16"
    teacher_dtype: str = "float32"
    max_tokens: int | None = None
    packing: bool = False
    bad_share: float = 0.01
    workers: int = 1
    save_every: int = 500
    log_every: int = 10
    evaluate: int = 0
    base_model: str | None = None

    def __post_init__(self):
        _check_choice("initialization", self.initialization, INITIALIZATIONS)
        _check_choice("precision", self.precision, ("bf16", "fp32"))
        for name in ("dtype", "teacher_dtype"):
            _check_choice(name, getattr(self, name), ("bfloat16", "float16", "float32"))
        if self.strategy is not None:
            _check_choice("strategy", self.strategy, STRATEGIES)
        if (self.strategy is None) != (self.num_attention is None):
            raise ValueError(
                f"strategy={self.strategy!r} and num_attention={self.num_attention} belong together; give both or "
                "neither."
            )
        if self.strategy is not None and self.attention_layers is not None:
            raise ValueError("attention_layers and strategy are two ways to say the same; give one of them.")
        if sorted(set(self.stages)) != self.stages or not set(self.stages) <= {1, 2, 3}:
            raise ValueError(f"stages={self.stages} must be some of 1, 2 and 3, in order, each once.")
        for stage in self.stages:
            if self.stage(stage) is None:
                raise ValueError(f"stages={self.stages} needs stage_{stage}, which is not given.")
        if self.strategy == "measured" and (3 not in self.stages or len(self.stages) < 2):
            raise ValueError(
                f"strategy='measured' measures mixers that stages 1 or 2 have trained and places attention for stage "
                f"3; stages={self.stages} lacks one of them."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers, at least 0 and below 1.")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"bad_share={self.bad_share} must lie between 0 and 1.")
        for minimum, names in MINIMUMS.items():
            for name in names:
                if getattr(self, name) is not None and getattr(self, name) < minimum:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {minimum}.")

    def stage(self, number: int) -> Stage | None:
        """The schedule of stage 1, 2 or 3."""
        return getattr(self, f"stage_{number}")


MINIMUMS = {
    0: ("seed", "weight_decay", "clip", "workers", "evaluate"),
    1: ("measure_batches", "max_tokens", "save_every", "log_every"),
}


def load_recipe(source: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: A YAML file, or the name of one of the package's recipes, such as `shapes-linear`.
        overrides: `key=value`, dotted for a stage's keys (`stage_3.steps=100`); values are YAML.

    Raises:
        ValueError: if the file is no recipe, or a key or value is unknown or of the wrong type.
        FileNotFoundError: if there is no such recipe.
    """
    file = Path(source)
    if not file.is_file() and (RECIPES / f"{source}.yaml").is_file():
        file = RECIPES / f"{source}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"There is no recipe {source}; give a YAML file or one of {known}.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({error}); give a YAML file.") from None
    values = _parse(text, str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no recipe; it must hold keys and values, such as `teacher: DIR`.")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"{override!r} is no key=value, such as stage_3.steps=100.")
        *groups, key = name.split(".")
        target = values
        for group in groups:
            if target.get(group) is None:
                target[group] = {}
            target = target[group]
            if not isinstance(target, dict):
                raise ValueError(f"{override!r}: {group} has no keys of its own.")
        target[key] = _parse(text, override)
    return _from_dict(Recipe, values, "")


def dump_recipe(recipe: Recipe, file: Path) -> None:
    """Writes a recipe with every value, given or default."""
    write_text(file, yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def resolve_path(path: str) -> Path:
    """The path that a recipe means: `mmmamba:` at the start stands for the package's folder."""
    return PACKAGE / path.removeprefix("mmmamba:") if path.startswith("mmmamba:") else Path(path)


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in a mapping, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.composer.ComposerError(problem=f"the key {key} occurs twice")
        return node


def _parse(text: str, where: str):
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that do not exist; too many brackets
        problem = " ".join(str(error).split())
        raise ValueError(f"{where} is not YAML: {problem}") from None
    # Aliases can make a value contain itself, or a few lines as large as the memory.
    to_visit, visited = [value], 0
    while to_visit and visited <= MOST_VALUES:
        inner, visited = to_visit.pop(), visited + 1
        if isinstance(inner, dict | list):
            to_visit += inner.values() if isinstance(inner, dict) else inner
    if to_visit:
        raise ValueError(f"{where} refers to itself, or has more than {MOST_VALUES} values; write them out.")
    return value


def _from_dict(kind: type, values: dict, prefix: str):
    """A dataclass from parsed YAML, with errors that name the key."""
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    type_hints = typing.get_type_hints(kind)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(known)}."
            raise ValueError(f"The recipe has no key {prefix}{key}{hint}")
    missing = [
        name
        for name, entry in known.items()
        if entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
        and values.get(name) is None
    ]
    if missing:
        raise ValueError(f"The recipe lacks {', '.join(prefix + name for name in missing)}.")
    converted = {key: _convert(type_hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{prefix.removesuffix('.')}: {error}" if prefix else str(error)) from None


def _convert(kind, value, key: str):
    """A value as its annotation says. Floats may be text: YAML 1.1 reads `1e-3` as one."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    (kind,) = (option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return _from_dict(kind, value, f"{key}.")
    elif typing.get_origin(kind) is list:
        if isinstance(value, list):
            (item,) = typing.get_args(kind)
            return [_convert(item, element, f"{key}[{i}]") for i, element in enumerate(value)]
    elif kind is float:
        try:
            if not isinstance(value, bool) and math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    expected = "keys and values" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))
    expected = "a finite number" if kind is float else expected
    raise ValueError(f"{key}={value!r} in the recipe is of the wrong type; it must be {expected}.")


def _check_choice(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(options)}.")
