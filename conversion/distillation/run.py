"""A distillation run: seed, stage 1, 2, 3, export; each a folder that appears whole, so that a run can go on.

    runs/mine/recipe.yaml       what is run, with every value
    runs/mine/seeded/           the seeded student
    runs/mine/stage-1/model/    the student after stage 1; beside it checkpoints/, logs/ (TensorBoard) and loss.png
    runs/mine/placed/           after a measured placement: the student whose costliest layers are attention again
    runs/mine/model/            the finished student
    runs/mine/results.json      losses, times, tokens and scores

A stage that met conversations it could not read lists them in its bad_rows.jsonl.
"""

import argparse
import copy
import gc
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import EvalResult
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import (
    Provenance,
    check_model_folder,
    expected_specs,
    model_card,
    whole_folder,
    write_model_folder,
)
from mmmamba.conversion.seeding import attention_layers, seed_folder
from mmmamba.conversion.shards import ShardReader, ShardWriter, read_json, write_json
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .cost import cost_table, costs
from .data import BadRows, local_files
from .end_to_end import EndToEndDistiller
from .layerwise import LayerwiseDistiller
from .placement import costliest, layer_costs
from .recipe import OF_SEEDING, Recipe, differences, dump_recipe, load_recipe, resolve
from .sources import Source
from .trainer import (
    WHOLE,
    DistillationTrainer,
    accumulation,
    last_checkpoint,
    plot_losses,
    readers_of,
    training_arguments,
)


class Run:
    """One recipe in one folder.

    Args:
        recipe: What to do.

    Raises:
        ValueError: if the teacher is no model folder of this package, or the output folder holds another recipe's run.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.output)
        self.teacher_folder = resolve(recipe.teacher)
        self.config = teacher_config(recipe)
        self.attention = self._attention()
        # Before anything that depends on how many processes there are. The others wait while one of them writes.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
        self.main = PartialState().is_main_process
        for number in recipe.stages:
            accumulation(recipe, number)
        if recipe.evaluate:
            from mmmamba.examples.shapes.evaluate import check_is_shapes_model

            check_is_shapes_model(self.teacher_folder)
        self.source = Source(recipe, self.teacher_folder)
        self.teacher: MmMambaForConditionalGeneration | None = None
        self._claim_folder()

    def _attention(self) -> list[int] | None:
        """Layers that stay attention; None while they are to be measured."""
        recipe, layers = self.recipe, self.config.text_config.num_hidden_layers
        if recipe.strategy == "measured":
            if not 0 < recipe.num_attention < layers:
                raise ValueError(f"num_attention={recipe.num_attention} must lie between 1 and {layers - 1}.")
            return None
        if recipe.strategy is not None:
            return attention_layers(layers, recipe.num_attention, recipe.strategy)
        return sorted(recipe.attention_layers or [])

    def _claim_folder(self) -> None:
        file = self.folder / "recipe.yaml"
        if file.is_file():
            if changed := differences(load_recipe(file), self.recipe, self._unused()):
                raise ValueError(
                    f"{self.folder} holds a run with another {', '.join(changed)}; give another output=FOLDER, or "
                    "remove this one to start anew."
                )
        elif self.folder.is_dir() and any(entry.name != "recipe.new" for entry in self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} exists and is no run; give another output=FOLDER.")
        self._meet()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            dump_recipe(self.recipe, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        self._meet()
        if not all(gather_object([file.is_file()])):
            raise FileNotFoundError(
                f"Not every process sees {file}, which the first one wrote; give an output=FOLDER that all machines "
                "share."
            )

    def _unused(self) -> set[str]:
        """Keys that have changed nothing yet: a stage that ran out of memory at once may get other settings."""
        there = {name for name in ("seeded", "placed", "model") if (self.folder / name).is_dir()}
        begun = self._begun()
        if "model" in there:
            return set()
        if not begun and "placed" not in there:
            every = {entry.name for entry in fields(Recipe)}
            return every - OF_SEEDING if "seeded" in there else every
        unused = {f"stage_{number}" for number in (1, 2, 3) if number not in begun}
        return unused if "placed" in there else unused | {"held_out", "measure_batches"}

    def _begun(self) -> list[int]:
        """Stages that have a model, or a checkpoint to go on from."""
        checkpoint = f"checkpoints/checkpoint-*/{WHOLE}"
        return [n for n in (1, 2, 3) if self.is_finished(n) or any(self.folder.glob(f"stage-{n}/{checkpoint}"))]

    def is_finished(self, number: int) -> bool:
        """Whether stage 1, 2 or 3 has its model."""
        return (self.folder / f"stage-{number}" / "model").is_dir()

    # --- steps -------------------------------------------------------------------------------------------------------

    def seed(self) -> None:
        """Makes `seeded/`."""
        folder = self.folder / "seeded"
        if self._is_there(folder, "the seeded student"):
            return
        if self.main:
            self._tidy()
            # A measured placement starts from the linear model.
            seed_folder(
                self.teacher_folder,
                folder,
                attention=self.attention or (),
                seed=self.recipe.seed,
                initialization=self.recipe.initialization,
                progress=True,
            )
        self._meet()

    def train(self, number: int) -> None:
        """Runs stage 1, 2 or 3, or goes on with it, and makes `stage-N/`."""
        folder, recipe = self.folder / f"stage-{number}", self.recipe
        stage = recipe.stage(number)
        if stage is None:
            raise ValueError(f"The recipe has no stage_{number}; add it.")
        if self._is_there(folder / "model", f"stage {number}"):
            self._remove(folder / "checkpoints")
            return
        self._check_order(number)
        before = self._before(number)
        rows = self.source.rows(number)
        args = training_arguments(recipe, number, folder / "checkpoints")
        self._load_teacher()
        set_seed(recipe.seed + number)
        student = self._load(before, torch.float32)
        if number == 3:
            distiller = EndToEndDistiller(
                self.teacher,
                student.train(),
                stage.trainable,
                temperature=stage.temperature,
                hard_weight=stage.hard_weight,
                answers_only=stage.answers_only,
                include_padding=stage.include_padding,
                chunk_size=stage.logits_chunk,
            )
            if stage.gradient_checkpointing:
                # The second name is that of Transformers before 5.23.
                enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
                enable()
        else:
            distiller = LayerwiseDistiller(self.teacher, student.train(), number, stage.include_padding)
        trained, share = _trained(distiller, sum(p.numel() for p in self.teacher.parameters()))
        if self.main:
            print(f"stage {number}: {share}")
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            # Of a start that came to nothing, perhaps with other data.
            self._remove(folder / "logs", folder / "bad_rows.jsonl")
            self._meet()
        else:
            self._check_resume(number, checkpoint, args, isinstance(rows, IterableDataset))
        bad_rows = BadRows(
            recipe.bad_share,
            folder / "bad_rows.jsonl",
            writes=self.main,
            size=self.source.size(rows),
            seen=int(checkpoint.name.removeprefix("checkpoint-")) * stage.batch_size if checkpoint else 0,
        )
        trainer = DistillationTrainer(
            distiller, args, rows, self.source.collate, stage, recipe.precision, bad_rows, folder / "logs"
        )
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - started
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        history, tokens = trainer.state.log_history, trainer.state.num_input_tokens_seen
        if self.main:
            write_json(folder / "history.json", {"history": history})
            plot_losses(history, f"{self.name}, stage {number}", folder / "loss.png")
            losses = [entry["loss"] for entry in history if "loss" in entry]
            self._note(
                f"stage_{number}",
                {
                    "loss": losses[-1] if losses else None,
                    "steps": stage.steps,
                    "tokens": tokens,
                    "trained": trained,
                    "seconds_since_start_or_resume": round(seconds, 1),
                    "bad_rows": bad_rows.count,
                },
            )
            # With its model a stage is finished, so that comes last. Its checkpoints would be many times that.
            self._write(folder / "model", before, [distiller.student_tensors(state)], f"{self.name}-stage-{number}")
            self._remove(folder / "checkpoints")
        del trainer, distiller, student, state
        gc.collect()
        self._meet()

    def place(self) -> None:
        """Measures what each layer's replacement costs and makes `placed/` with the costliest as attention."""
        folder = self.folder / "placed"
        if self._is_there(folder, "the measured placement"):
            return
        before = self._before(3, placed=False)
        self._load_teacher()
        if self.main:
            student = self._load(before, torch.float32).to(PartialState().device).eval()
            # As many conversations whatever the device holds at once.
            stage = self.recipe.stage(3)
            conversations = self.recipe.measure_batches * stage.batch_size
            at_once = stage.per_device_batch_size
            batches = self.source.held_out(conversations // at_once, at_once)
            costs = layer_costs(self.teacher, student, list(batches))
            chosen = costliest(costs, self.recipe.num_attention)
            self._note("placement", {"kl_per_token": costs, "conversations": conversations, "attention": chosen})
            print(f"placement: layers {', '.join(map(str, chosen))} cost most and stay attention")
            config = copy.deepcopy(self.config)
            config.text_config.layer_types = [
                "full_attention" if layer in chosen else "linear_attention" for layer in range(len(costs))
            ]
            self._write(folder, self.teacher_folder, [ShardReader(before)], f"{self.name}-placed", config)
        self._meet()

    def export(self) -> None:
        """Makes `model/`: the last stage's student in the wanted dtype, scored, with its card."""
        folder, recipe = self.folder / "model", self.recipe
        there = self._is_there(folder, "the finished model")
        last = self.folder / f"stage-{recipe.stages[-1]}" / "model" if recipe.stages else self.folder / "seeded"
        if not there and not last.is_dir():
            raise ValueError(
                f"{last.parent.name} of {self.folder} is not finished, so there is nothing to export yet."
            )
        if self.main and not there:
            for key in ("scores", "card"):  # of another model
                self._note(key, None)
            self._write(folder, last, [], self.name, None, getattr(torch, recipe.dtype), self._provenance())
            print(f"written to {folder}")
        if self.main and recipe.evaluate not in (0, self._results().get("scores", {}).get("questions")):
            from mmmamba.examples.shapes.evaluate import evaluate

            scores = evaluate(folder, recipe.evaluate)
            self._note("scores", scores)
            kinds = ", ".join(f"{kind} {row['exact']:.1%}" for kind, row in scores["kinds"].items())
            print(f"held-out questions right: {scores['total']['exact']:.1%} ({kinds})")
        if self.main:
            self._write_card(folder)

    # --- pieces ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.recipe.name or self.folder.resolve().name

    def _load_teacher(self) -> None:
        """Loads the teacher, once for all stages."""
        if self.teacher is None:
            self.teacher = self._load(self.teacher_folder, getattr(torch, self.recipe.teacher_dtype))
            self.teacher = self.teacher.to(PartialState().device).eval().requires_grad_(False)

    def _load(self, folder: Path, dtype: torch.dtype) -> MmMambaForConditionalGeneration:
        kwargs = {}
        if self.recipe.attn_implementation is not None:
            kwargs["attn_implementation"] = self.recipe.attn_implementation
        return MmMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)

    def _before(self, number: int, placed: bool = True) -> Path:
        """The newest student that a stage can start from; says loudly when a stage before it was left out."""
        candidates = [(f"stage {n}", self.folder / f"stage-{n}" / "model", n) for n in range(number - 1, 0, -1)]
        if placed and number == 3 and self.recipe.strategy == "measured":
            candidates.insert(0, ("the placement", self.folder / "placed", 2))
        candidates.append(("the seeded student", self.folder / "seeded", 0))
        for what, folder, n in candidates:
            if folder.is_dir():
                if n < number - 1 and self.main:
                    skipped = " and ".join(str(i) for i in range(n + 1, number))
                    print(f"WARNING: stage {number} starts from {what}, without stage {skipped} before it.")
                return folder
        raise ValueError(f"{self.folder} has no seeded student to start from; run the recipe with its seeding first.")

    def _write(
        self,
        destination: Path,
        base: Path,
        trained: list[Mapping[str, Tensor] | ShardReader],
        name: str,
        config: MmMambaConfig | None = None,
        dtype: torch.dtype = torch.float32,
        provenance: Provenance | None = None,
    ) -> None:
        """A model folder of `base`'s tensors where `trained` has none of that name."""
        config = config or MmMambaConfig.from_pretrained(base)
        config.dtype = dtype
        sources = [*trained, ShardReader(base)]

        def read(tensor_name: str) -> Tensor:
            for source in sources:
                if tensor_name in (source.specs if isinstance(source, ShardReader) else source):
                    return source[tensor_name].to(dtype)
            raise KeyError(tensor_name)

        specs = {key: spec.to(dtype) for key, spec in expected_specs(config).items()}
        self._tidy()
        with whole_folder(destination) as folder:
            with ShardWriter(folder, specs) as writer:
                for key in specs:
                    writer.write(key, read(key))
            write_model_folder(folder, config, name, companions=self.teacher_folder, provenance=provenance)

    def _write_card(self, folder: Path) -> None:
        """A finished model's card, with what is known by now; one that somebody edited stays."""
        card = model_card(self.name, MmMambaConfig.from_pretrained(folder), provenance=self._provenance())
        file = folder / "README.md"
        found = file.read_text(encoding="utf-8") if file.is_file() else card
        if found != card and self._results().get("card", _digest(found)) != _digest(found):
            print(f"{file} was edited and stays as it is")
            return
        if found != card or not file.is_file():
            file.with_suffix(".new").write_text(card, encoding="utf-8")
            file.with_suffix(".new").replace(file)
        self._note("card", _digest(card))

    def _check_order(self, number: int) -> None:
        """A stage that later ones did not wait for would be part of nothing that they end with."""
        later = [f"stage-{n}" for n in self._begun() if n > number]
        after = ("model",) if number == 3 else ("placed", "model")
        later += [name for name in after if (self.folder / name).is_dir()]
        if later:
            names = ", ".join(later)
            raise ValueError(
                f"{self.folder} has no finished stage {number} but {names}, made without it; remove {names} to train "
                "it first, or go on with later steps one by one (--only)."
            )

    def _is_there(self, folder: Path, what: str) -> bool:
        """Whether a step is done already. Every process sees the same, as none goes on before all have looked."""
        there = folder.is_dir()
        self._meet()
        if there and self.main:
            print(f"{what} is there: {folder}")
        return there

    def _remove(self, *paths: Path) -> None:
        for path in paths if self.main else ():
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _meet(self) -> None:
        """Waits for all processes, and sees what they have written: NFS looks again only when a folder is opened."""
        PartialState().wait_for_everyone()
        folder = self.folder.absolute()
        for one in (*reversed(folder.parents), folder, *folder.glob("stage-*")):
            with suppress(OSError):
                os.scandir(one).close()

    def _tidy(self) -> None:
        """Removes what a killed run left of a folder that it was writing."""
        for folder in self.folder.rglob(".*.unfinished-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _check_resume(self, number: int, checkpoint: Path, args: TrainingArguments, streaming: bool) -> None:
        before, now = read_json(checkpoint / WHOLE), readers_of(args)
        if before != now and streaming:
            raise ValueError(
                f"{checkpoint} was read by {before} and this run reads by {now}, which changes the order of a stream; "
                "start it with as many processes and workers as before."
            )
        if self.main:
            print(f"stage {number}: goes on from {checkpoint}")
            if before["processes"] != now["processes"]:
                print(
                    f"WARNING: {before['processes']} processes wrote it and {now['processes']} go on; sums may differ "
                    "in their last digits."
                )

    def _results(self) -> dict:
        file = self.folder / "results.json"
        return read_json(file) if file.is_file() else {}

    def _note(self, key: str, value) -> None:
        """Writes down a result; None takes it back."""
        file = self.folder / "results.json"
        results = {name: one for name, one in (self._results() | {key: value}).items() if one is not None}
        write_json(file.with_suffix(".new"), results)
        file.with_suffix(".new").replace(file)  # whole at every moment

    def _provenance(self) -> Provenance:
        recipe, results = self.recipe, self._results()
        stages = {n: results[f"stage_{n}"] for n in (1, 2, 3) if f"stage_{n}" in results}
        words = [f"stage {n}: {one['steps']:,} steps, {one['tokens']:,} tokens" for n, one in stages.items()]
        entries = [entry for entry in recipe.data if isinstance(entry, dict)]
        scores = results.get("scores")
        return Provenance(
            base_model=recipe.base_model,
            origin=f"Seeded from {self.teacher_folder.name} and distilled from it.",
            datasets=[entry["dataset"] for entry in entries if "dataset" in entry and not local_files(entry)],
            files=[name for entry in entries for name in _named(entry)],
            results=[
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type="shapes",
                    dataset_name=f"{scores['questions']} held-out questions of the shapes picture world",
                    metric_type="exact_match",
                    metric_value=round(scores["total"]["exact"], 4),
                )
            ]
            if scores
            else [],
            training="; ".join(words) or None,
        )


def _named(entry: dict) -> list[str]:
    """What a source that is not on the Hub is called."""
    if "shapes" in entry:
        return ["the shapes picture world"]
    return [str(entry["file"])] if "file" in entry else local_files(entry)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def teacher_config(recipe: Recipe) -> MmMambaConfig:
    """The teacher's configuration. Raises ValueError if it is no model folder of this package."""
    check_model_folder(resolve(recipe.teacher))
    return MmMambaConfig.from_pretrained(resolve(recipe.teacher))


def _trained(distiller: torch.nn.Module, of: int) -> tuple[dict, str]:
    """What trains, by kind of parameter: for the results and in words."""
    counts: dict[str, int] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            kind = re.sub(r"^(mixers\.\d+|student\.model\.layers\.\d+)\.", "", name)
            kind = kind.replace("parametrizations.weight.original1", "weight (gate and dt rows)")
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    total = sum(counts.values())
    words = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
    return counts, f"{total:,} parameters train, {total / of:.1%} of the teacher's {of:,}: {words}"


def distill(recipe: Recipe, only: str | None = None) -> Path:
    """Runs a recipe, or goes on with it where it stopped.

    Args:
        recipe: See `load_recipe`.
        only: `seed`, `1`, `2`, `3` or `export`: this step alone.

    Returns:
        The run's folder.

    Raises:
        ValueError: for whatever is wrong with the recipe, the teacher, the data or the folder, in one sentence.
    """
    run = Run(recipe)
    numbers = recipe.stages if only is None else [int(only)] if only in ("1", "2", "3") else []
    if not all(run.is_finished(number) for number in numbers):
        run.source.check()
    if only in (None, "seed"):
        run.seed()
    for number in numbers:
        if number == 3 and recipe.strategy == "measured":
            run.place()
        run.train(number)
    if only in (None, "export"):
        run.export()
    return run.folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mmmamba distill`."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a recipe of the package, e.g. shapes-linear")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as stage_3.steps=100 output=runs/mine")
    parser.add_argument(
        "--cost", type=int, metavar="TOKENS", help="only compute the cost, for conversations of so many tokens"
    )
    parser.add_argument("--only", choices=("seed", "1", "2", "3", "export"), help="run this step alone")


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba distill`."""
    disable_progress_bar()  # of loading weights, which takes a moment; training has one of its own
    recipe = load_recipe(args.recipe, args.overrides)
    if args.cost is not None:
        if args.cost < 1:
            raise ValueError(f"--cost {args.cost} is no number of tokens per conversation; give 1 or more.")
        print(cost_table(costs(recipe, teacher_config(recipe), args.cost), args.cost))
        return
    folder = distill(recipe, args.only)
    if PartialState().is_main_process and (folder / "results.json").is_file():
        summary = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for key, value in summary.items():
            if key.startswith("stage_") and value["loss"] is not None:
                print(f"{key.replace('_', ' ')}: loss {value['loss']:.4g} after {value['tokens']:,} tokens")
