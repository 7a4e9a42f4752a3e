"""Trains the teacher of the picture world from nothing: a small HoVLE, all attention.

    python -m mmmamba.examples.shapes.train runs/shapes-teacher

Just under an hour on two processor cores; started again it goes on where it stopped. `mmmamba distill shapes-linear`
and `shapes-hybrid` then make students of it.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.checkpoints import MarkCompleteCheckpoints, last_checkpoint
from mmmamba.conversion.distillation.data import pad
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .data import Conversations
from .folder import make_processor, save


STEPS = 9000
BATCH_SIZE = 32


def config(vocab_size: int, image_token_id: int, end_of_turn_id: int) -> MmMambaConfig:
    """The HoVLE shape in small: 1.3 million parameters."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_embedding_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Weights this narrow need a wide start: at the usual 0.02 attention stays uniform for a thousand steps.
        "initializer_range": 0.06,
        "max_position_embeddings": 2048,
        "ssm_chunk_size": 64,  # short sequences: smaller chunks waste less
        "eos_token_id": end_of_turn_id,
    }
    vision = {"image_size": 48, "patch_size": 12, "use_pixel_shuffle": True, "initializer_range": 0.06}
    return MmMambaConfig(text_config=text, vision_config=vision, image_token_id=image_token_id)


def fit(
    model: MmMambaForConditionalGeneration,
    rows: Dataset,
    checkpoints: Path,
    steps: int,
    learning_rate: float = 2e-3,
    pad_token_id: int = 2,
    seed: int = 0,
) -> None:
    """Trains a model on answers: warm up, keep the learning rate, let it fall for the last fifth of the steps.

    Args:
        model: Changed in place.
        rows: An `EndlessDataset`; its `batch_size` is a step's.
        checkpoints: Folder of the Trainer's checkpoints, to resume from if it exists.
        steps: Optimiser steps.
        learning_rate: At the top.
        pad_token_id: Fills short rows.
        seed: Of all but the rows.
    """
    options = TrainingArguments(
        output_dir=checkpoints,
        max_steps=steps,
        learning_rate=learning_rate,
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 5, "min_lr_ratio": 0.02},
        warmup_steps=min(200, steps // 5),
        per_device_train_batch_size=rows.batch_size,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=8,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_steps=500,
        save_total_limit=2,
        report_to=[],
        seed=seed,
        remove_unused_columns=False,
    )
    collate = partial(pad, pad_token_id=pad_token_id)
    callbacks = [MarkCompleteCheckpoints()]
    trainer = Trainer(model, options, data_collator=collate, train_dataset=rows, callbacks=callbacks)
    checkpoint = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the teacher of the picture world from nothing.")
    parser.add_argument("folder", type=Path, help="model folder to make")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists; give a folder that does not.")
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is no number of steps; give 1 or more.")

    set_seed(args.seed)
    processor = make_processor()
    ids = processor.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|im_end|>"])
    # Plain matrix products beat the fused attention kernel for heads and sequences this small.
    model = MmMambaForConditionalGeneration._from_config(
        config(len(processor.tokenizer), *ids), attn_implementation="eager", dtype=torch.float32
    )
    checkpoints = args.folder.with_name(args.folder.name + "-checkpoints")
    rows = Conversations(processor, "train", args.seed, BATCH_SIZE)
    fit(model, rows, checkpoints, args.steps, pad_token_id=processor.tokenizer.pad_token_id, seed=args.seed)
    origin = f"Trained from nothing on the shapes picture world, {args.steps:,} steps."
    save(model, args.folder, "shapes-teacher", origin)
    shutil.rmtree(checkpoints, ignore_errors=True)


if __name__ == "__main__":
    main()
