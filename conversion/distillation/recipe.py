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
STAGES = (1, 2, 3, 4)  # layer by layer (1, 2), end to end (3), supervised fine-tuning (4)
TRAINABLE = ("mixers", "mixers+o_proj", "decoder")
ALIGNMENTS = ("heads", "output")
DIVERGENCES = ("forward", "reverse")


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
        row_tokens: Tokens of a row of a document; the recipe's if not given. Several numbers, from short to long,
            share the steps evenly, one after the other; then `batch_size` counts rows of the longest, and each of
            them is cut into shorter ones, so that a step has as many tokens throughout. Conversations stay whole.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    decay: int = 0
    batch_size: int = 32
    per_device_batch_size: int = 32
    min_lr_ratio: float = 0.0
    include_padding: bool = False
    row_tokens: int | list[int] | None = None

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
        lengths = self.row_tokens if isinstance(self.row_tokens, list) else [self.row_tokens]
        if not 0 < len(lengths) <= self.steps or sorted(set(lengths)) != lengths:
            raise ValueError(f"row_tokens={lengths} must grow, each for at least one of steps={self.steps}.")
        if self.row_tokens is not None and lengths[0] < 2:
            raise ValueError(f"row_tokens={self.row_tokens} must be at least 2.")


@dataclass(frozen=True)
class AlignmentStage(Stage):
    """Stage 2's schedule and what it compares.

    Args:
        align: `heads`, before the output projection, as published; or `output`, behind it, and the output projection
            trains, too (arXiv 2408.10189, 2505.03005).
    """

    align: str = "heads"

    def __post_init__(self):
        super().__post_init__()
        _check_choice("align", self.align, ALIGNMENTS)


@dataclass(frozen=True)
class EndToEndStage(Stage):
    """Stage 3's schedule and loss.

    Args:
        trainable: What trains: `mixers` (as published), `mixers+o_proj` (their output projections, too), or `decoder`
            (all layers with MLPs and norms, and the attention layers of a hybrid).
        temperature: Softens both distributions.
        kl_weight: Weight of the KL divergence. With 0 the student learns from the labels alone and no teacher runs.
        divergence: `forward`, KL(teacher || student), or `reverse`, KL(student || teacher).
        hard_weight: Weight of the answers' cross entropy beside it; in documents every token is an answer's.
        answers_only: Whether the KL divergence counts only where an answer's token is predicted.
        on_policy: Share of the micro-batches whose answers the student writes itself (arXiv 2306.13649): those of
            conversations from the first one on, and the second half of a row of a document.
        on_policy_tokens: Most tokens of such an answer.
        on_policy_temperature: Of sampling it; 0 for greedy answers.
        gradient_checkpointing: Recompute each layer's activations in the backward pass instead of storing them.
        logits_chunk: Positions whose logits exist at once.
    """

    trainable: str = "mixers"
    temperature: float = 1.0
    kl_weight: float = 1.0
    divergence: str = "forward"
    hard_weight: float = 0.0
    answers_only: bool = False
    on_policy: float = 0.0
    on_policy_tokens: int = 128
    on_policy_temperature: float = 1.0
    gradient_checkpointing: bool = False
    logits_chunk: int = 512

    def __post_init__(self):
        super().__post_init__()
        _check_choice("trainable", self.trainable, TRAINABLE)
        _check_choice("divergence", self.divergence, DIVERGENCES)
        if self.temperature <= 0 or self.hard_weight < 0 or self.logits_chunk < 1:
            raise ValueError(
                f"temperature={self.temperature} must be above 0, hard_weight={self.hard_weight} at least 0 and "
                f"logits_chunk={self.logits_chunk} at least 1."
            )
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must be at least 0.")
        if not 0 <= self.on_policy <= 1 or self.on_policy_tokens < 1 or self.on_policy_temperature < 0:
            raise ValueError(
                f"on_policy={self.on_policy} must lie between 0 and 1, on_policy_tokens={self.on_policy_tokens} be at "
                f"least 1 and on_policy_temperature={self.on_policy_temperature} at least 0."
            )
        if self.on_policy and not self.kl_weight:
            raise ValueError(
                f"on_policy={self.on_policy} needs a teacher to compare answers with; make kl_weight greater than 0."
            )
        if not self.kl_weight and not self.hard_weight:
            raise ValueError("kl_weight=0 and hard_weight=0 leave nothing to learn; make one of them greater than 0.")


@dataclass(frozen=True)
class FineTuningStage(Stage):
    """Stage 4's schedule: supervised fine-tuning on labels, without the teacher.

    Args:
        trainable, gradient_checkpointing, logits_chunk: As in stage 3.
        data: What it trains on, as the recipe's `data`, which it is if not given.
    """

    trainable: str = "decoder"
    gradient_checkpointing: bool = False
    logits_chunk: int = 512
    data: list | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_choice("trainable", self.trainable, TRAINABLE)
        if self.logits_chunk < 1:
            raise ValueError(f"logits_chunk={self.logits_chunk} must be at least 1.")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Args:
        teacher: Model folder whose layers are all attention.
        output: Folder of the run, which is resumed if it exists.
        data: Sources of conversations and documents, see `mmmamba.conversion.distillation.data.open_data`.
        name: What the student is called; the output folder's name if not given.
        attention_layers: Layers that stay attention.
        num_attention: Or how many, placed by `strategy`. With neither key the student is linear.
        strategy: One of the published placements, or `measured`: the layers whose Mamba-2 replacement costs most.
        measure_batches: Batches of stage 3's `batch_size` on which `measured` measures.
        held_out: Sources like those of `data` to measure on, which no stage trains on; the picture world has its own.
        initialization: `mimic` as published; `inherited` without the parameters that mimic linear attention; `scratch`
            without queries, keys and values, too.
        seed: Of new parameters, data order and all else that is random.
        stages: Which of 1 to 4 run.
        stage_1, stage_2, stage_3, stage_4: Their schedules.
        betas: AdamW's.
        weight_decay: On matrices and convolutions.
        clip: Largest gradient norm; 0 for none.
        attn_implementation: Of the attention layers; Transformers' own choice if not given.
        precision: `bf16` (autocast) or `fp32`.
        dtype: Of the exported weights.
        teacher_dtype: Of the teacher's weights while it runs.
        max_tokens: Longer conversations are bad rows.
        row_tokens: Documents are cut into rows of as many tokens.
        packing: Several rows in one, without padding.
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
    stage_2: AlignmentStage | None = None
    stage_3: EndToEndStage | None = None
    stage_4: FineTuningStage | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    clip: float = 5.0
    attn_implementation: str | None = None
    precision: str = "bf16"
    dtype: str = "bfloat16"
    teacher_dtype: str = "float32"
    max_tokens: int | None = None
    row_tokens: int = 512
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
        if sorted(set(self.stages)) != self.stages or not set(self.stages) <= set(STAGES):
            raise ValueError(f"stages={self.stages} must be some of 1, 2, 3 and 4, in order, each once.")
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
        """The schedule of a stage, None if it is not given."""
        return getattr(self, f"stage_{number}")

    def needs_teacher(self, number: int) -> bool:
        """Whether the teacher runs in a stage."""
        return number < 3 or (number == 3 and self.stage(number).kl_weight > 0)

    def stage_data(self, number: int) -> list:
        """What a stage trains on: its own `data`, else the recipe's."""
        own = getattr(self.stage(number), "data", None)
        return self.data if own is None else own


MINIMUMS = {
    0: ("seed", "weight_decay", "clip", "workers", "evaluate"),
    1: ("measure_batches", "max_tokens", "save_every", "log_every"),
    2: ("row_tokens",),
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
    kinds = [option for option in options if option is not type(None)]
    # Of several the one that fits; the first, which the error names, if none does.
    kind = next((option for option in kinds if isinstance(value, typing.get_origin(option) or option)), kinds[0])
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
