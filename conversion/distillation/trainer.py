"""Transformers' Trainer on a distiller: counts over all devices, checkpoints that are whole, progress and plots.

What is computed is in `layerwise` and `end_to_end`; devices, precision, accumulation, sharding, checkpoints and the
learning rate are the Trainer's and Accelerate's.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .counting import totals_of
from .data import BadRows
from .recipe import Recipe, Stage


WHOLE = "whole"  # a file of this name is the last thing that a checkpoint gets
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def accumulation(recipe: Recipe, number: int) -> int:
    """Micro-batches per step and process. Raises ValueError if a batch cannot be dealt out to the processes."""
    stage, processes = recipe.stage(number), PartialState().num_processes
    per_pass = stage.per_device_batch_size * processes
    if stage.batch_size % per_pass:
        raise ValueError(
            f"stage_{number}.batch_size={stage.batch_size} cannot be dealt out to {processes} processes of "
            f"per_device_batch_size={stage.per_device_batch_size}; make it a multiple of {per_pass}."
        )
    return stage.batch_size // per_pass


def training_arguments(recipe: Recipe, number: int, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for one stage.

    Args:
        recipe: Of the run.
        number: 1, 2 or 3.
        folder: Of the stage's checkpoints.
    """
    stage, seed = recipe.stage(number), recipe.seed + number
    # Precision is `compute_loss`'s: FSDP would leave autocast out, DeepSpeed turn decay rates and biases into bf16.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": stage.decay, "min_lr_ratio": stage.min_lr_ratio},
        warmup_steps=stage.warmup,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        per_device_train_batch_size=stage.per_device_batch_size,
        gradient_accumulation_steps=accumulation(recipe, number),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=recipe.workers,
        dataloader_prefetch_factor=4 if recipe.workers else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=2,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )
    if (
        args.n_gpu > 1
    ):  # the Trainer would split batches over threads, which gradients computed on the spot cannot bear
        args._n_gpu = 1
        print(f"One of {torch.cuda.device_count()} GPUs is used; start with `accelerate launch` to use them all.")
    return args


class DistillationTrainer(Trainer):
    """The Trainer for a module whose forward is the loss, over counts of all micro-batches and processes of a step.

    Args:
        distiller: A `LayerwiseDistiller` or `EndToEndDistiller`.
        args: See `training_arguments`.
        rows: Conversations, as `data.open_data` or the picture world gives them.
        collate: Rows to a batch.
        stage: Its schedule.
        precision: `bf16` (autocast) or `fp32`.
        bad_rows: Counts the rows that could not be read.
        logs: Folder of the TensorBoard logs.
    """

    def __init__(
        self,
        distiller: nn.Module,
        args: TrainingArguments,
        rows: Dataset,
        collate: Callable[[list[dict]], dict],
        stage: Stage,
        precision: str,
        bad_rows: BadRows,
        logs: Path,
    ):
        self.bad_rows, self.include_padding, self.precision = bad_rows, stage.include_padding, precision
        super().__init__(distiller, args, data_collator=collate, train_dataset=rows)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(WholeCheckpoints())
        if self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(_Progress())
            self.add_callback(TensorBoardCallback(SummaryWriter(logs)))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on decay rates, step biases, norms and biases: all that is no matrix or convolution."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_train_sampler(self, *args, **kwargs):
        total = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
        return passes(self.train_dataset, total * self.args.world_size, self.args.data_seed)

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # A stream deals its rows out to processes itself, so that each row is read and decoded by one of them only.
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """(2,), the step's positions and answers over all micro-batches and processes."""
        totals, rows, bad = torch.zeros(2, dtype=torch.long), 0, []
        for batch in batch_samples:
            bad += batch.pop("bad_rows", [])
            rows += int((batch["position_ids"] == 0).sum()) if "position_ids" in batch else len(batch["input_ids"])
            totals += totals_of(batch, self.include_padding)
        counts = torch.cat([totals, torch.tensor([rows, len(bad)])]).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        positions, _, rows, named = counts.tolist()
        # Every process counts the bad rows of all, so that all of them stop together.
        self.bad_rows.add(gather_object(bad) if named else [])
        self.bad_rows.check(rows)
        self.state.num_input_tokens_seen += positions
        return counts[:2].clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = model(**inputs, num_items_in_batch=num_items_in_batch)
        # Data-parallel gradients are averaged over processes, but a loss over the counts of all of them is a share.
        return loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        logs["tokens"] = self.state.num_input_tokens_seen
        super().log(logs, *args, **kwargs)


def passes(rows: Dataset, total: int, seed: int) -> Sampler:
    """Places of a whole run's rows: all of them in each pass, each pass in another order.

    The Trainer's own epochs may end in the middle of a step; here every step has all its rows, and however many
    processes share them, they are the same. Rows that are `ordered` (and endless) are read from front to back.
    """
    if getattr(rows, "ordered", False):
        return SequentialSampler(rows)
    return RandomSampler(rows, num_samples=total, generator=torch.Generator().manual_seed(seed))


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part of it, with how many processes there were."""

    def on_step_end(self, args, state, control, **kwargs):
        # What follows the last step is the finished model. A run that was resumed there would take a step too many.
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE
            mark.with_suffix(".new").write_text(json.dumps(readers_of(args)), encoding="utf-8")
            mark.with_suffix(".new").replace(mark)  # there with its content or not at all


def readers_of(args: TrainingArguments) -> dict[str, int]:
    """What the order of a stream depends on: processes, and their workers that read data."""
    return {"processes": args.world_size, "workers": args.dataloader_num_workers}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage; those that a kill left half-written are deleted."""
    found = {
        int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    }
    whole = [step for step, path in found.items() if (path / WHOLE).is_file()]
    state = PartialState()
    if state.is_main_process:
        for step in found.keys() - set(whole):
            shutil.rmtree(found[step])
    state.wait_for_everyone()
    return found[max(whole)] if whole else None


class _Progress(TrainerCallback):
    """One line with the loss, tokens per second and the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, mininterval=1)
        self.since, self.tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        rate = (state.num_input_tokens_seen - self.tokens) / max(now - self.since, 1e-9)
        self.since, self.tokens = now, state.num_input_tokens_seen
        self.bar.set_postfix_str(f"loss {logs['loss']:.4g}, {rate:,.0f} tokens/s", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def plot_losses(history: list[dict], title: str, file: Path) -> None:
    """Draws the loss over steps.

    Args:
        history: The Trainer's log history.
        title: Of the plot.
        file: PNG to write.
    """
    from matplotlib.figure import Figure  # without pyplot no display is looked for

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), linewidth=1)
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
