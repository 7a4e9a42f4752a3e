"""Makes a student of the picture world's teacher: seeds it, then distils it in three stages.

    python -m mmmamba.examples.shapes.distill linear runs/shapes-linear
    python -m mmmamba.examples.shapes.distill hybrid runs/shapes-hybrid

About half an hour each on two processor cores.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_wsd_schedule, set_seed

from mmmamba.conversion.distillation.end_to_end import distillation_loss
from mmmamba.conversion.distillation.layerwise import SCALE, HeldRows, layer_errors, mixers, parameter_groups
from mmmamba.conversion.publish import check_model_folder
from mmmamba.conversion.seeding import attention_layers, seed_state_dict
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .data import Batches, Conversations
from .folder import make_processor, save


TEACHER = Path(__file__).with_name("teacher")


@dataclass(frozen=True)
class Stage:
    """One stage's schedule: warm up over a tenth of the steps, stay, decay over the last quarter."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """How a student is made.

    The published recipe trains the mixers alone in stage 3. Six narrow layers leave little room for that: here the
    whole decoder is trained, with its MLPs, its norms and the attention layers of a hybrid, on the answers' tokens;
    and the true answers count beside the teacher's distribution.
    """

    attention: tuple[int, ...]
    layerwise: Stage = Stage(200, 3e-3)
    projections: Stage = Stage(400, 2e-3)
    end_to_end: Stage = Stage(2500, 1.5e-3)
    hard_weight: float = 0.5
    batch_size: int = 32


RECIPES = {
    "linear": Recipe(attention=(), end_to_end=Stage(3000, 1.5e-3)),
    "hybrid": Recipe(attention=tuple(attention_layers(6, 2, "head-interleaved"))),
}


def run_stage(
    name: str,
    stage: Stage,
    named: list[tuple[str, torch.nn.Parameter]],
    batches: Iterator[dict[str, Tensor]],
    accelerator: Accelerator,
    backward: Callable[[dict[str, Tensor]], float],
    of: int,
    held: HeldRows | None = None,
) -> None:
    """Optimises `named` parameters, of `of` in all; `backward(batch)` adds gradients and returns the loss to show."""
    count = sum(p.numel() for _, p in named) - (held.numel if held else 0)
    kinds = sorted({re.sub(r"^model\.layers\.\d+\.", "", name) for name, _ in named})
    part = " (of in_proj the gate and dt rows)" if held else ""
    print(f"{name}: {count:,} of {of:,} parameters train ({count / of:.1%}): {', '.join(kinds)}{part}")
    optimizer = torch.optim.AdamW(parameter_groups(named), lr=stage.learning_rate, betas=(0.9, 0.98))
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=stage.steps // 10,
        num_decay_steps=stage.steps // 4,
        num_training_steps=stage.steps,
        min_lr_ratio=0.02,
    )
    shown = None
    progress = tqdm(range(stage.steps), desc=name, mininterval=5)
    for _ in progress:
        with accelerator.autocast():
            loss = backward(next(batches))
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        if held:
            held.put_back()
        schedule.step()
        optimizer.zero_grad()
        shown = loss if shown is None else 0.95 * shown + 0.05 * loss
        progress.set_postfix(loss=f"{shown:.4f}", refresh=False)


def distill(recipe: Recipe, teacher_folder: Path, seed: int = 0) -> MmMambaForConditionalGeneration:
    """Seeds a student from the teacher and distils it."""
    set_seed(seed)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    teacher = MmMambaForConditionalGeneration.from_pretrained(
        teacher_folder, dtype=torch.float32, attn_implementation="eager"
    )
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    state, config = seed_state_dict(teacher.state_dict(), teacher.config, recipe.attention, seed)
    student = MmMambaForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    student.load_state_dict(state)
    student.to(accelerator.device).train()
    learners = mixers(student)

    rows = Conversations(make_processor(), "train", seed + 1)  # not the teacher's conversations
    loader = DataLoader(Batches(rows, recipe.batch_size), batch_size=None, num_workers=1, prefetch_factor=8)
    batches = ({k: v.to(accelerator.device) for k, v in batch.items()} for batch in loader)

    def layerwise(batch):
        return SCALE * layer_errors(teacher, learners, batch, backward=True).mean().item()

    def end_to_end(batch):
        with torch.no_grad():
            truth = teacher(**batch, use_cache=False).logits
        logits = student(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        loss = distillation_loss(
            logits, truth, batch["labels"], batch["attention_mask"], hard_weight=recipe.hard_weight, answers_only=True
        )
        loss.backward()
        return loss.item()

    parameters = list(student.named_parameters())
    of = sum(p.numel() for _, p in parameters)
    mixing = [(name, p) for name, p in parameters if ".mamba." in name and "out_proj" not in name]
    held = HeldRows(learners)
    run_stage("stage 1", recipe.layerwise, mixing, batches, accelerator, layerwise, of, held)
    held.release()
    run_stage("stage 2", recipe.projections, mixing, batches, accelerator, layerwise, of)
    decoder = [(name, p) for name, p in parameters if ".layers." in name]
    run_stage("stage 3", recipe.end_to_end, decoder, batches, accelerator, end_to_end, of)
    return student


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Seed and distil a student of the picture world's teacher.")
    parser.add_argument("student", choices=RECIPES)
    parser.add_argument("folder", type=Path, help="model folder to make")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="model folder of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists; give a folder that does not.")
    try:
        check_model_folder(args.teacher)
    except ValueError as error:
        parser.error(f"--teacher {error}")
    student = distill(RECIPES[args.student], args.teacher, args.seed)
    save(
        student, args.folder, f"shapes-{args.student}", "Seeded from the shapes teacher and distilled in three stages."
    )


if __name__ == "__main__":
    main()
