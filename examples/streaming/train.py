"""Teaches the small linear model to answer about the latest frame of a stream, however many came before.

    python -m mmmamba.examples.streaming.train runs/streaming

The shipped models were trained on one to three pictures, and are lost behind the first few. This goes on from the
linear one with streams of 1 to 16 frames.
"""

import argparse
import math
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.examples.shapes.data import EndlessDataset
from mmmamba.examples.shapes.folder import SHIPPED, make_processor, save
from mmmamba.examples.shapes.tokenizer import SYSTEM_MESSAGE
from mmmamba.examples.shapes.train import fit
from mmmamba.examples.shapes.world import TRAINING, questions
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import MmMambaProcessor

from .scenes import FRAME, scenes


STEPS = 300
BATCH_SIZE = 8
MAX_FRAMES = 16


class StreamConversations(EndlessDataset):
    """Streams of the picture world, and questions about the last frame of each.

    The number of frames is log-uniform between 1 and `max_frames`; a scene stays for one frame or longer.

    Args:
        processor: Of the picture world.
        seed: Of the series.
        batch_size: Conversations of similar length that follow each other.
        max_frames: Of a stream.
    """

    def __init__(self, processor: MmMambaProcessor, seed: int = 0, batch_size: int = 1, max_frames: int = MAX_FRAMES):
        super().__init__(seed, batch_size)
        self.encoder, self.max_frames = ConversationEncoder(processor), max_frames

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        rng = np.random.default_rng((self.seed, index))
        count = round(math.exp(rng.uniform(0, math.log(self.max_frames))))
        hold = rng.choice((1, 2, 4, 8))
        asked = []
        while not asked:
            shown = list(islice(scenes("train", self.seed, int(rng.integers(2**32)), hold), count))
            asked = questions(rng, shown[-1:], TRAINING["turns"], TRAINING["repeats"])
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        frames = FRAME * count + "\n"
        for question, answer in asked:
            messages.append({"role": "user", "content": frames + question})
            messages.append({"role": "assistant", "content": answer})
            frames = ""
        return self.encoder({"messages": messages, "images": [picture.draw() for picture in shown]})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Teach the small linear model to watch a stream.")
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
    model = MmMambaForConditionalGeneration.from_pretrained(SHIPPED / "linear", dtype=torch.float32)
    checkpoints = args.folder.with_name(args.folder.name + "-checkpoints")
    rows = StreamConversations(processor, args.seed, BATCH_SIZE)
    options = {"learning_rate": 1e-3, "pad_token_id": processor.tokenizer.pad_token_id, "seed": args.seed}
    fit(model, rows, checkpoints, args.steps, bf16=False, **options)
    origin = f"The linear model of the shapes world, trained on with streams of frames for {args.steps:,} steps."
    save(model, args.folder, "shapes-streaming", origin)
    shutil.rmtree(checkpoints, ignore_errors=True)


if __name__ == "__main__":
    main()
