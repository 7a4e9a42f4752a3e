"""Whole distillation runs that take seconds: a tiny teacher of the picture world, and recipes of a few steps."""

import gc
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_models import tiny_config

from mmmamba.configuration_mmmamba import MmMambaVisionConfig
from mmmamba.conversion.distillation import stages
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.distillation.run import distill
from mmmamba.conversion.distillation.trainer import DistillationTrainer
from mmmamba.examples.shapes.data import Conversations
from mmmamba.examples.shapes.folder import make_processor, save
from mmmamba.examples.shapes.world import TILE, example
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


# Few steps, small batches, no bf16: quick, and equal to the last bit where it should be.
SMALL = [
    "precision=fp32", "dtype=float32", "save_every=2", "log_every=1", "evaluate=0", "workers=0",
    *(
        f"stage_{n}.{key}={value}"
        for n in (1, 2, 3)
        for key, value in {"steps": 4, "warmup": 1, "decay": 2, "batch_size": 2, "per_device_batch_size": 2}.items()
    ),
]  # fmt: skip
ACCUMULATION = [f"stage_{n}.batch_size=4" for n in (1, 2, 3)]  # two micro-batches per step


@contextmanager
def quick_runs():
    """One thread and no GPU, so that forked processes compute the same; no plots, no row encoded twice."""
    plain, rows = Conversations.row, {}

    def row(self, index):
        key = (self.split, self.seed, index)
        if key not in rows:
            rows[key] = plain(self, index)
        return rows[key]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage often, and what Transformers has imported takes long to go through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(stages, "plot_losses", lambda *_: None)
        patch.setattr(Conversations, "pool", 2)
        patch.setattr(Conversations, "row", row)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def make_teacher(folder):
    """A random teacher of the picture world: four narrow layers."""
    processor = make_processor()
    image_token, end_of_turn = processor.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|im_end|>"])
    config = tiny_config(
        "teacher", image_token, vocab_size=len(processor.tokenizer), eos_token_id=end_of_turn, initializer_range=0.1
    )
    config.vision_config = MmMambaVisionConfig(image_size=TILE, patch_size=12, use_pixel_shuffle=True)
    torch.manual_seed(0)
    model = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32)
    save(model, folder, "tiny", "Random.")
    return folder


def small_recipe(teacher: Path, folder: Path, *overrides: str):
    return load_recipe("shapes-hybrid", [*SMALL, f"teacher={teacher}", f"output={folder}", *overrides])


def write_conversations(folder: Path) -> Path:
    """Five conversations of a user, one of them without its image, as JSON Lines."""
    lines = []
    for index in range(5):
        one = example("train", 0, index)
        images = [f"{index}-{i}.png" for i in range(len(one.pictures))]
        for name, picture in zip(images, one.pictures, strict=True):
            if index != 3:
                picture.draw().save(folder / name)
        turns = [
            {"from": "human", "value": "<image>" * len(images) + "\n" + one.question},
            {"from": "gpt", "value": one.answer},
        ]
        lines.append(json.dumps({"image": images, "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def results(run):
    return json.loads((run / "results.json").read_text())


def same_weights(run, other):
    """Equal to the last bit."""
    one, two = weights(run), weights(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def stop(recipe, step=3, stage=None):
    """A run that is interrupted when it begins a step (of a stage), counted from 0; the steps that it took."""
    plain, steps = DistillationTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step and (stage is None or f"stage-{stage}" in self.args.output_dir):
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "training_step", interrupted)
        distill(recipe)
    return steps
