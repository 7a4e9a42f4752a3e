"""Trains the teacher of the picture world from nothing: a small HoVLE, all attention.

    python -m mmmamba.examples.shapes.train runs/shapes-teacher

About 50 minutes on two processor cores. `mmmamba distill shapes-linear` and `shapes-hybrid` then make students of it.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.data import pad
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .data import Conversations
from .folder import make_processor, save


# Steps of each cycle of the learning rate (up, level, down); each goes on from what the one before reached.
CYCLES = (8000, 3000)
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


def training_arguments(folder: Path, steps: int, seed: int) -> TrainingArguments:
    """One cycle: warm up, keep the learning rate for two thirds of the steps, let it fall for the last third."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=2e-3,
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3, "min_lr_ratio": 0.02},
        warmup_steps=200,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=8,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
        remove_unused_columns=False,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the teacher of the picture world from nothing.")
    parser.add_argument("folder", type=Path, help="model folder to make")
    parser.add_argument("--cycles", type=int, nargs="+", default=CYCLES, help=f"training steps (default: {CYCLES})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists; give a folder that does not.")
    if min(args.cycles) < 1:
        parser.error(f"--cycles {args.cycles} are no numbers of steps; give 1 or more for each.")

    set_seed(args.seed)
    processor = make_processor()
    ids = processor.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|im_end|>"])
    # Plain matrix products beat the fused attention kernel for heads and sequences this small.
    model = MmMambaForConditionalGeneration._from_config(
        config(len(processor.tokenizer), *ids), attn_implementation="eager", dtype=torch.float32
    )
    collate = partial(pad, pad_token_id=processor.tokenizer.pad_token_id)
    for cycle, steps in enumerate(args.cycles):
        rows = Conversations(processor, "train", args.seed + 1000 * cycle, BATCH_SIZE)
        options = training_arguments(args.folder.with_name(args.folder.name + "-training"), steps, args.seed)
        Trainer(model, options, data_collator=collate, train_dataset=rows).train()
    steps = " + ".join(map(str, args.cycles))
    save(model, args.folder, "shapes-teacher", f"Trained from nothing on the shapes picture world, {steps} steps.")


if __name__ == "__main__":
    main()
