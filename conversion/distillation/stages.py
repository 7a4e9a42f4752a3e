"""The steps of a run: seed a student, train it in its stages, place attention layers by measurement, export.

Each makes one model folder and does nothing if that exists.
"""

import copy
import gc
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import (
    Provenance,
    check_model_folder,
    check_unquantized,
    expected_specs,
    license_of,
    whole_folder,
    write_card,
    write_model_files,
    write_model_folder,
)
from mmmamba.conversion.seeding import attention_layers, seed_folder
from mmmamba.conversion.shards import ShardReader, ShardWriter, read_json, write_json
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .card import student_card
from .checkpoints import check_launch, check_sharding, last_checkpoint, stream_file
from .data import BadRowCounter, ConversationStream
from .data.training_data import TrainingData
from .end_to_end import EndToEndDistiller
from .folder import RunFolder
from .layerwise import LayerwiseDistiller
from .on_policy import NEEDS_WHOLE_WEIGHTS, AnswerWriter
from .placement import costliest_layers, replacement_kl
from .recipe import Recipe, resolve_path
from .trainer import DistillationTrainer, gradient_accumulation_steps, plot_losses, training_arguments


class Run:
    """What the steps of a run share. Makes nothing yet.

    Args:
        recipe: What to do.

    Attributes:
        folder: The run's folder.
        name: What the student is called.
        is_main: Whether this process prints and writes; the others only train.
        teacher_folder, teacher_config: The teacher's folder and configuration.
        attention: Layers that stay attention; None if they are to be measured.
        data: The conversations.

    Raises:
        ValueError: if the teacher is no model folder of this package, or the recipe does not fit it, its data or the
            number of processes.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, RunFolder(recipe.output)
        self.name = recipe.name or self.folder.path.resolve().name
        self.teacher_folder = resolve_path(recipe.teacher)
        self.teacher_config = load_teacher_config(recipe)
        self.attention = _attention_layers(recipe, self.teacher_config.text_config.num_hidden_layers)
        # Starts the process group. Processes wait while one of them writes a model or measures a placement.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
        self.is_main = PartialState().is_main_process
        for number in recipe.stages:
            gradient_accumulation_steps(recipe, number)
        under_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")  # what `accelerate launch` sets
        if under_fsdp and 3 in recipe.stages and recipe.stage(3).on_policy:
            raise ValueError(NEEDS_WHOLE_WEIGHTS)
        if recipe.evaluate:
            from mmmamba.examples.shapes.evaluate import check_is_shapes_model

            check_is_shapes_model(self.teacher_folder)
        self.data = TrainingData(recipe, self.teacher_folder)

    @cached_property
    def teacher(self) -> MmMambaForConditionalGeneration:
        """The teacher, frozen, on this process's device; loaded once for all stages."""
        teacher = self.load(self.teacher_folder, getattr(torch, self.recipe.teacher_dtype))
        return teacher.to(PartialState().device).eval().requires_grad_(False)

    def load(self, folder: Path, dtype: torch.dtype) -> MmMambaForConditionalGeneration:
        """A model with the recipe's attention implementation."""
        kwargs = {}
        if self.recipe.attn_implementation is not None:
            kwargs["attn_implementation"] = self.recipe.attn_implementation
        return MmMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)


def load_teacher_config(recipe: Recipe) -> MmMambaConfig:
    """The teacher's configuration. Raises ValueError if it is no model folder of this package."""
    check_model_folder(resolve_path(recipe.teacher))
    check_unquantized(resolve_path(recipe.teacher))
    return MmMambaConfig.from_pretrained(resolve_path(recipe.teacher))


def _attention_layers(recipe: Recipe, num_layers: int) -> list[int] | None:
    if recipe.strategy == "measured":
        if not 0 < recipe.num_attention < num_layers:
            raise ValueError(f"num_attention={recipe.num_attention} must lie between 1 and {num_layers - 1}.")
        return None
    if recipe.strategy is not None:
        return attention_layers(num_layers, recipe.num_attention, recipe.strategy)
    return sorted(recipe.attention_layers or [])


def seed(run: Run) -> None:
    """Makes `seeded/`."""
    if run.folder.has(run.folder.seeded, "the seeded student"):
        return
    if run.is_main:
        seed_folder(
            run.teacher_folder,
            run.folder.seeded,
            attention=run.attention or (),  # a measured placement starts from the linear model
            seed=run.recipe.seed,
            initialization=run.recipe.initialization,
            progress=True,
        )
    PartialState().wait_for_everyone()


def train(run: Run, number: int) -> None:
    """Runs a stage, or resumes it, and makes `stage-N/`.

    Raises:
        ValueError: if the recipe has no such stage, or the run's folder is not ready for it.
    """
    recipe, folder = run.recipe, run.folder.stage(number)
    model_folder, checkpoints = run.folder.stage_model(number), folder / "checkpoints"
    stage = recipe.stage(number)
    if stage is None:
        raise ValueError(f"The recipe has no stage_{number}; add it.")
    if run.folder.has(model_folder, f"stage {number}"):
        run.folder.remove(checkpoints)
        return
    run.folder.check_order(number)
    before = run.folder.student_before(number, placed=recipe.strategy == "measured")
    dataset = run.data.for_stage(number)
    args = training_arguments(recipe, number, checkpoints)
    teacher_size = sum(spec.numel() for spec in expected_specs(run.teacher_config).values())
    set_seed(recipe.seed + number)
    teacher = run.teacher if recipe.needs_teacher(number) else None
    distiller = make_distiller(recipe, number, teacher, run.load(before, torch.float32).train())
    trained, summary = _count_trained(distiller, teacher_size)
    if run.is_main:
        print(f"stage {number}: {summary}")
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint is None:
        # Left by a start that made no checkpoint, perhaps with other data.
        run.folder.remove(folder / "logs", folder / "bad_rows.jsonl")
        PartialState().wait_for_everyone()
    elif isinstance(dataset, ConversationStream):
        _load_position(dataset, checkpoint, recipe.workers, run.is_main)
    bad_rows = BadRowCounter(
        recipe.bad_share,
        folder / "bad_rows.jsonl",
        writes=run.is_main,
        num_records=getattr(dataset, "num_records", None),
        seen=int(checkpoint.name.removeprefix("checkpoint-")) * stage.batch_size if checkpoint else 0,
    )
    writer = _answer_writer(run, number, args)
    trainer = DistillationTrainer(
        distiller,
        args,
        dataset,
        run.data.collate,
        run.data.normalize,
        stage,
        recipe.precision,
        bad_rows,
        folder / "logs",
        writer,
    )
    check_sharding()
    warning = check_launch(checkpoint) if checkpoint else None
    if checkpoint and run.is_main:
        print(f"stage {number}: resumes from {checkpoint}")
        if warning:
            print(warning)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if run.is_main:
        history = trainer.state.log_history
        write_json(folder / "history.json", {"history": history})
        plot_losses(history, f"{run.name}, stage {number}", folder / "loss.png")
        losses = [entry["loss"] for entry in history if "loss" in entry]
        run.folder.record(
            f"stage_{number}",
            {
                "loss": losses[-1] if losses else None,
                "steps": stage.steps,
                "tokens": trainer.state.num_input_tokens_seen,
                "trained": trained,
                "seconds_since_start_or_resume": round(seconds, 1),
                "bad_rows": bad_rows.count,
            },
        )
        # The model marks the stage as finished, so it comes last.
        config = MmMambaConfig.from_pretrained(before)
        with whole_folder(model_folder) as partial:
            _write_weights(partial, config, torch.float32, [distiller.student_tensors(state), ShardReader(before)])
            write_model_folder(partial, config, f"{run.name}-stage-{number}", **_from_teacher(run))
        run.folder.remove(checkpoints)
    del trainer, distiller, state
    gc.collect()
    PartialState().wait_for_everyone()


def place(run: Run) -> None:
    """Measures what each layer's replacement costs and makes `placed/`, with the costliest as attention."""
    if run.folder.has(run.folder.placed, "the measured placement"):
        return
    before = run.folder.student_before(3)
    if run.is_main:
        student = run.load(before, torch.float32).to(PartialState().device).eval()
        # The same conversations for any per-device batch size.
        stage = run.recipe.stage(3)
        num_conversations = run.recipe.measure_batches * stage.batch_size
        batch_size = stage.per_device_batch_size
        batches = list(run.data.held_out(num_conversations // batch_size, batch_size))
        costs = replacement_kl(run.teacher, student, batches)
        chosen = costliest_layers(costs, run.recipe.num_attention)
        run.folder.record(
            "placement", {"kl_per_token": costs, "conversations": num_conversations, "attention": chosen}
        )
        print(f"placement: layers {', '.join(map(str, chosen))} cost most and stay attention")
        config = copy.deepcopy(run.teacher_config)
        config.text_config.layer_types = [
            "full_attention" if layer in chosen else "linear_attention" for layer in range(len(costs))
        ]
        with whole_folder(run.folder.placed) as partial:
            _write_weights(partial, config, torch.float32, [ShardReader(before), ShardReader(run.teacher_folder)])
            write_model_folder(partial, config, f"{run.name}-placed", **_from_teacher(run))
    PartialState().wait_for_everyone()


def export(run: Run) -> None:
    """Makes `model/`: the last stage's student in the recipe's dtype, scored, with its card.

    A card that exists is never overwritten.

    Raises:
        ValueError: if the last stage is not finished.
    """
    recipe, destination = run.recipe, run.folder.model
    last = run.folder.stage_model(recipe.stages[-1]) if recipe.stages else run.folder.seeded
    exists = run.folder.has(destination, "the finished model")
    if not exists and not last.is_dir():
        raise ValueError(
            f"{last.relative_to(run.folder.path).parts[0]} of {run.folder.path} is not finished, so there is nothing "
            "to export yet."
        )
    if not run.is_main:
        return
    if exists:
        scored = _score(run, destination)
        card = student_card(run.name, MmMambaConfig.from_pretrained(destination), recipe, run.folder.results())
        if not write_card(destination, card) and scored:
            print(f"{destination / 'README.md'} exists and stays as it is; remove it to get one with these scores")
        return
    run.folder.record("scores", None)  # of another model
    config = MmMambaConfig.from_pretrained(last)
    with whole_folder(destination) as partial:
        _write_weights(partial, config, getattr(torch, recipe.dtype), [ShardReader(last)])
        write_model_files(partial, config, companions=run.teacher_folder)
        _score(run, partial)
        write_card(partial, student_card(run.name, config, recipe, run.folder.results()))
    print(f"written to {destination}")


def make_distiller(recipe: Recipe, number: int, teacher: nn.Module | None, student: nn.Module) -> nn.Module:
    """The module that a stage trains, with `requires_grad` set. Teacher and student are changed.

    The teacher may be None where `recipe.needs_teacher(number)` is false.
    """
    stage = recipe.stage(number)
    if number < 3:
        align = stage.align if number == 2 else "heads"
        return LayerwiseDistiller(teacher, student, number, stage.include_padding, align)
    if stage.gradient_checkpointing:
        # The second name is that of Transformers before 5.23.
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable()
    if number == 4:
        return EndToEndDistiller(
            None, student, stage.trainable, kl_weight=0.0, hard_weight=1.0, chunk_size=stage.logits_chunk
        )
    return EndToEndDistiller(
        teacher,
        student,
        stage.trainable,
        temperature=stage.temperature,
        kl_weight=stage.kl_weight,
        divergence=stage.divergence,
        hard_weight=stage.hard_weight,
        answers_only=stage.answers_only,
        include_padding=stage.include_padding,
        chunk_size=stage.logits_chunk,
    )


def _from_teacher(run: Run) -> dict[str, Any]:
    """What `write_model_folder` takes from the teacher for a model between two stages."""
    provenance = Provenance(base_model_relation=None, license=license_of(run.teacher_folder))
    return {"companions": run.teacher_folder, "provenance": provenance}


def _answer_writer(run: Run, number: int, args: TrainingArguments) -> AnswerWriter | None:
    stage = run.recipe.stage(number)
    if number != 3 or not stage.on_policy:
        return None
    ends = run.teacher.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), run.data.tokenizer.eos_token_id} - {None}
    return AnswerWriter(
        stage.on_policy,
        stage.on_policy_tokens,
        stage.on_policy_temperature,
        ends,
        run.data.pad_token_id,
        run.data.collate,
        args.data_seed,
        args.process_index,
        run.data.normalize,
    )


def _count_trained(distiller: nn.Module, teacher_size: int) -> tuple[dict[str, int], str]:
    """Number of trained parameters by their name within a layer, and the same in words."""
    counts: dict[str, int] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            kind = re.sub(r"^(mixers\.\d+|student\.model\.layers\.\d+)\.", "", name)
            kind = kind.replace("parametrizations.weight.original1", "weight (gate and dt rows)")
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    total = sum(counts.values())
    words = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
    return counts, f"{total:,} parameters train, {total / teacher_size:.1%} of the teacher's {teacher_size:,}: {words}"


def _load_position(stream: ConversationStream, checkpoint: Path, workers: int, is_main: bool) -> None:
    """Lets a stream begin where a checkpoint ends. Raises ValueError if that does not say where."""
    if not stream_file(checkpoint, 0).is_file():
        raise ValueError(
            f"{checkpoint} does not say how far its stream was read, as an older version wrote it; remove "
            f"{checkpoint.parent} to train the stage from its first step."
        )
    if stream_file(checkpoint).is_file():  # if not, there are more processes now, which the checkpoint's launch tells
        stream.load_state_dict(read_json(stream_file(checkpoint)))
    used = stream.num_workers(workers)
    if is_main and used != workers:
        print(f"The stream goes on with {used} workers per process, not {workers}, so that its order stays.")


def _score(run: Run, folder: Path) -> bool:
    """Scores a model on as many questions of the picture world as the recipe says. Returns whether scores are new."""
    if run.recipe.evaluate in (0, run.folder.results().get("scores", {}).get("questions")):
        return False
    from mmmamba.examples.shapes.evaluate import evaluate

    scores = evaluate(folder, run.recipe.evaluate)
    run.folder.record("scores", scores)
    kinds = ", ".join(f"{kind} {row['exact']:.1%}" for kind, row in scores["kinds"].items())
    print(f"held-out questions right: {scores['total']['exact']:.1%} ({kinds})")
    return True


def _write_weights(
    folder: Path, config: MmMambaConfig, dtype: torch.dtype, sources: Sequence[Mapping[str, Tensor] | ShardReader]
) -> None:
    """Writes a model's weights, each from the first source that has it, and sets the configuration's dtype."""
    config.dtype = dtype
    specs = {name: spec.to(dtype) for name, spec in expected_specs(config).items()}
    with ShardWriter(folder, specs) as writer:
        for name in specs:
            writer.write(name, next(source[name] for source in sources if name in source).to(dtype))
