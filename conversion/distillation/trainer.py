"""Transformers' Trainer on a distiller: token counts over all devices, bad rows, progress and plots.

The losses are in `layerwise` and `end_to_end`; devices, accumulation, sharding, checkpoints and the learning rate are
the Trainer's and Accelerate's.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .checkpoints import MarkCompleteCheckpoints
from .data import BadRowCounter, ConversationStream, StreamLoader, TileNormalizer
from .data.curriculum import CurriculumSampler, LengthCurriculum
from .losses import count_tokens
from .on_policy import NEEDS_WHOLE_WEIGHTS, AnswerWriter
from .recipe import Recipe, Stage


def gradient_accumulation_steps(recipe: Recipe, number: int) -> int:
    """Micro-batches per step and process. Raises ValueError if a batch cannot be split evenly between processes."""
    stage, processes = recipe.stage(number), PartialState().num_processes
    micro_batch = stage.per_device_batch_size * processes
    if stage.batch_size % micro_batch:
        raise ValueError(
            f"stage_{number}.batch_size={stage.batch_size} cannot be split between {processes} processes of "
            f"per_device_batch_size={stage.per_device_batch_size}; make it a multiple of {micro_batch}."
        )
    return stage.batch_size // micro_batch


def training_arguments(recipe: Recipe, number: int, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for one stage.

    Args:
        recipe: Of the run.
        number: Of the stage.
        folder: Of the stage's checkpoints.
    """
    stage, seed = recipe.stage(number), recipe.seed + number
    # `compute_loss` sets the precision: FSDP would leave autocast out, DeepSpeed turn A_log and biases into bf16.
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
        gradient_accumulation_steps=gradient_accumulation_steps(recipe, number),
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
    if args.n_gpu > 1:
        # The Trainer would use DataParallel, whose threads do not support gradients computed in the forward pass.
        args._n_gpu = 1
        print(f"One of {torch.cuda.device_count()} GPUs is used; start with `accelerate launch` to use them all.")
    return args


class DistillationTrainer(Trainer):
    """The Trainer for a module whose forward is the loss, over counts of all micro-batches and processes of a step.

    Args:
        distiller: A `LayerwiseDistiller` or `EndToEndDistiller`.
        args: See `training_arguments`.
        dataset: See `TrainingData.for_stage`.
        collate: From rows to a batch.
        normalize: From the tiles of a batch to those that models read.
        stage: Its schedule.
        precision: `bf16` (autocast) or `fp32`.
        bad_rows: Counts the rows that could not be read.
        logs: Folder of the TensorBoard logs.
        answer_writer: Replaces answers by the student's own, see `on_policy`; None for none.

    Raises:
        ValueError: if the student is to write answers and its weights are sharded; from `train`, if the loss is NaN or
            infinite.
    """

    def __init__(
        self,
        distiller: nn.Module,
        args: TrainingArguments,
        dataset: Dataset,
        collate: Callable[[list[dict]], dict],
        normalize: TileNormalizer,
        stage: Stage,
        precision: str,
        bad_rows: BadRowCounter,
        logs: Path,
        answer_writer: AnswerWriter | None = None,
    ):
        self.bad_rows, self.include_padding, self.precision = bad_rows, stage.include_padding, precision
        self.answer_writer, self.normalize = answer_writer, normalize
        # A stream begins where its checkpoint says; of other data the Trainer skips what was read.
        args.ignore_data_skip = isinstance(dataset, ConversationStream)
        super().__init__(distiller, args, data_collator=collate, train_dataset=dataset)
        if answer_writer is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(NEEDS_WHOLE_WEIGHTS)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(MarkCompleteCheckpoints())
        self._progress_bar = _ProgressBar()
        if self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(self._progress_bar)
            self.add_callback(TensorBoardCallback(SummaryWriter(logs)))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress_bar.close()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and convolutions: there is no weight decay on A_log, dt_bias, norms and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if isinstance(self.train_dataset, LengthCurriculum):
            return CurriculumSampler(self.train_dataset, args.max_steps, batch_size, args.data_seed)
        return repeating_sampler(self.train_dataset, args.max_steps * batch_size, args.data_seed)

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        if not isinstance(self.train_dataset, ConversationStream):
            return super().get_train_dataloader()
        # A stream splits itself between processes, so that each row is decoded by one of them only.
        args = self.args
        return StreamLoader(
            self.train_dataset, args.per_device_train_batch_size, self.data_collator, args.dataloader_num_workers
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """(4,), see `count_tokens`, over all micro-batches and processes of the step.

        This is where all of a step's micro-batches are at hand before any trains, so the student writes its answers
        to some of them here.
        """
        tokens, num_rows, bad = torch.zeros(4, dtype=torch.long), 0, []
        for index, batch in enumerate(batch_samples):
            bad += batch.pop("bad_rows", [])
            packed = "position_ids" in batch
            rows = int((batch["position_ids"] == 0).sum()) if packed else len(batch["input_ids"])
            num_rows += batch.pop("num_rows", rows)
            if self.answer_writer is not None:
                batch = send_to_device(batch, device)  # those of a stream are not there yet
                with self._autocast():
                    batch = self.answer_writer(self.model.student, batch, self.state.global_step, index)
                batch_samples[index] = batch
            tokens += count_tokens(batch, self.include_padding, self.model.extra_positions_per_tile)
        counts = torch.cat([tokens, torch.tensor([num_rows, len(bad)])]).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        positions, *_, num_rows, num_bad = counts.tolist()
        # Every process counts the bad rows of all, so that all of them stop together.
        self.bad_rows.add(gather_object(bad) if num_bad else [])
        self.bad_rows.check(num_rows)
        self.state.num_input_tokens_seen += positions
        return counts[:4].clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "pixel_values" in inputs:
            inputs = inputs | {"pixel_values": self.normalize(inputs["pixel_values"])}
        with self._autocast():
            loss = model(**inputs, num_items_in_batch=num_items_in_batch)
        # Data parallelism averages gradients over processes, but this loss is already divided by the counts of all.
        return loss * self.accelerator.num_processes

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        for key in ("loss", "train_loss"):  # of the last steps, and in the end of all
            if not math.isfinite(logs.get(key, 0.0)):
                folder = Path(self.args.output_dir).parent
                raise ValueError(
                    f"{folder.name} diverged: its loss is {logs[key]} at step {self.state.global_step}; remove "
                    f"{folder} and start again with a lower learning_rate or clip."
                )
        logs["tokens"] = self.state.num_input_tokens_seen
        super().log(logs, *args, **kwargs)


def repeating_sampler(dataset: Dataset, num_samples: int, seed: int) -> Sampler:
    """The indices of a whole run: every row once per epoch, each epoch in another order.

    The Trainer's own epochs may end in the middle of a step; here every step has all its rows, and they are the same
    for any number of processes. A dataset that is `ordered` (and endless) is read from front to back.
    """
    if getattr(dataset, "ordered", False):
        return SequentialSampler(dataset)
    return RandomSampler(dataset, num_samples=num_samples, generator=torch.Generator().manual_seed(seed))


class _ProgressBar(TrainerCallback):
    """One line with the loss, tokens per second and the time left."""

    bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, mininterval=1)
        self.last_time, self.last_tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        rate = (state.num_input_tokens_seen - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_time, self.last_tokens = now, state.num_input_tokens_seen
        self.bar.set_postfix_str(f"loss {logs['loss']:.4g}, {rate:,.0f} tokens/s", refresh=False)

    def close(self) -> None:
        """Ends the line, so that what is said next, such as an error, has one of its own."""
        if self.bar is not None:
            self.bar.close()


def plot_losses(history: list[dict], title: str, file: Path) -> None:
    """Draws the loss over steps.

    Args:
        history: The Trainer's log history.
        title: Of the plot.
        file: PNG to write.
    """
    from matplotlib.figure import Figure  # pyplot would look for a display

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), linewidth=1)
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
