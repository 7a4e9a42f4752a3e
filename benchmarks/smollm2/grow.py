"""Grows a teacher that reads pictures from SmolLM2, in HoVLE's three steps (arXiv 2412.16158, section 3.3).

1. `distill`: patch embedding and embedding layers alone learn that a picture's rows mean the text embedding of its
   name. HoVLE's rows learn a vision encoder's features; here is no encoder, but a name for each picture.
2. `align`: the same parts learn answers through the language model, which is frozen.
3. `tune`: all but token table and head learns answers.

Each is a run of Transformers' Trainer that goes on from its last checkpoint.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from mmmamba.benchmarks.smollm2.packages import fetch_smollm2
from mmmamba.benchmarks.smollm2.pictures import (
    AUGMENTATION,
    SIDE,
    Concept,
    prepare_pictures,
    read_concepts,
    training_pictures,
)
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.convert import VisionPlan, convert
from mmmamba.conversion.distillation.checkpoints import MarkCompleteCheckpoints, last_checkpoint
from mmmamba.conversion.distillation.data import TileNormalizer, open_data, pad
from mmmamba.conversion.distillation.data.training_data import load_processor
from mmmamba.conversion.distillation.trainer import plot_losses
from mmmamba.conversion.publish import whole_folder, write_model_folder
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaModel


# 64 patches, shuffled into 16 rows; with two layers more than its 30, an eighth of the student's can be attention.
PLAN = VisionPlan(embedding_layers=2, image_size=SIDE, patch_size=8, max_patches=1)


@dataclass(frozen=True)
class Phase:
    """A step's schedule: AdamW, a tenth of the steps warmup, then a cosine to 0.

    Args:
        steps: Optimiser steps.
        batch_size: Pictures, or conversations, of each.
        learning_rate: The highest.
        save_every: Steps between checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    save_every: int


PHASES = {
    "distill": Phase(steps=1200, batch_size=32, learning_rate=5e-4, save_every=50),
    "align": Phase(steps=40, batch_size=8, learning_rate=5e-4, save_every=20),
    "tune": Phase(steps=600, batch_size=8, learning_rate=2e-4, save_every=20),
}


def prepare(folder: Path) -> None:
    """Makes pictures, conversations and `teacher/` in a folder; what is there stays.

    See `prepare_pictures` for errors.
    """
    prepare_pictures(folder)
    if (folder / "teacher").is_dir():
        return
    grown = folder / "grown"
    if not grown.is_dir():
        convert(fetch_smollm2(folder / "downloads"), grown, vision=PLAN)
    grow(folder, grown, PHASES)


def grow(folder: Path, grown: Path, phases: dict[str, Phase]) -> None:
    """Trains the three steps and writes `teacher/`.

    Args:
        folder: With pictures and conversations, see `prepare_pictures`.
        grown: The language model with a new patch embedding and new embedding layers.
        phases: The steps' schedules: `distill`, `align` and `tune`.
    """
    processor, concepts = load_processor(grown), read_concepts(folder)
    normalize = TileNormalizer(processor.image_processor)
    if not (folder / "distilled.safetensors").is_file():
        model = MmMambaForConditionalGeneration.from_pretrained(grown, dtype=torch.float32)
        names = name_embeddings(model.model.embed_tokens.weight, processor.tokenizer, concepts)
        embedding = NamedEmbedding(model, names)
        phase = phases["distill"]
        data = NamedPictures(folder / "pictures", concepts, phase.steps * phase.batch_size)
        _train(embedding, phase, data, partial(_stack, normalize), folder / "distill")
        _save(embedding.model.state_dict(), folder / "distilled.safetensors")
    conversations = open_data({"file": str(folder / "train.jsonl"), "root": str(folder / "pictures")}, processor)
    collate = partial(_conversations, normalize, processor.tokenizer.pad_token_id)
    for name, source, target in (("align", "distilled", "aligned"), ("tune", "aligned", "teacher")):
        if (folder / f"{target}.safetensors").is_file():
            continue
        model = MmMambaForConditionalGeneration.from_pretrained(grown, dtype=torch.float32)
        model.model.load_state_dict(load_file(folder / f"{source}.safetensors"), strict=False)
        is_of_embedding = partial(_is_of_embedding, model.config)
        model.requires_grad_(False)
        for parameter_name, parameter in model.model.named_parameters():
            trains = name == "tune" or is_of_embedding(parameter_name)
            parameter.requires_grad_(trains and parameter_name != "embed_tokens.weight")
        _train(model, phases[name], conversations, collate, folder / name, AnswerTrainer)
        if name == "align":
            state = model.model.state_dict()
            _save({key: state[key] for key in filter(is_of_embedding, state)}, folder / "aligned.safetensors")
    with whole_folder(folder / "teacher") as destination:
        model.save_pretrained(destination)
        origin = "Grown from SmolLM2-135M-Instruct by benchmarks/real_pictures.py: it names emoji."
        write_model_folder(destination, model.config, "teacher", companions=grown, origin=origin)
    shutil.rmtree(folder / "tune")


def _is_of_embedding(config: MmMambaConfig, name: str) -> bool:
    """Whether a tensor of the model belongs to the patch embedding or to the embedding layers."""
    part, *rest = name.split(".")
    return part == "vision_embeddings" or (part == "layers" and int(rest[0]) < config.text_config.num_embedding_layers)


def name_embeddings(table: Tensor, tokenizer: PreTrainedTokenizerBase, concepts: list[Concept]) -> Tensor:
    """(concepts, hidden): each name's token embeddings, their mean.

    Args:
        table: (vocabulary, hidden), the token embeddings.
    """
    ids = [tokenizer(f" {concept.name}", add_special_tokens=False)["input_ids"] for concept in concepts]
    return torch.stack([table.detach()[row].mean(0) for row in ids])


class NamedEmbedding(nn.Module):
    """Patch embedding and embedding layers, whose rows are to be near the text embedding of what they show.

    Args:
        model: Whose patch embedding and embedding layers are copied.
        names: (concepts, hidden), text embeddings.
    """

    def __init__(self, model: MmMambaForConditionalGeneration, names: Tensor):
        super().__init__()
        config = MmMambaConfig(**{**model.config.to_dict(), "text_config": model.config.text_config.to_dict()})
        layers = config.text_config.num_hidden_layers = config.text_config.num_embedding_layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
        self.model = MmMambaModel(config)
        del self.model.embed_tokens
        self.model.norm = nn.Identity()
        state = model.model.state_dict()
        self.model.load_state_dict({name: state[name] for name in self.model.state_dict()})
        self.log_scale = nn.Parameter(torch.tensor(2.7))  # CLIP's first 1 / 0.07 (arXiv 2103.00020)
        self.register_buffer("names", names, persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and cosines.

        Args:
            pixel_values: (pictures, 3, side, side), normalised.
            labels: (pictures,), numbers of concepts.

        Returns:
            `loss`: cross entropy of scaled cosines of the rows' mean with the names, and the squared distance of each
            row from the right one; `logits` (pictures, concepts).
        """
        rows = self.model.get_image_features(pixel_values).pooler_output  # (pictures, rows, hidden)
        rows = self.model(inputs_embeds=rows, use_cache=False).last_hidden_state
        logits = self.log_scale.exp() * F.normalize(rows.mean(1), dim=-1) @ F.normalize(self.names, dim=-1).T
        # Of each row, so that the language model reads rows like those of texts.
        distance = F.mse_loss(rows, self.names[labels, None].expand_as(rows)) / self.names.var()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1) + distance, "logits": logits}


class NamedPictures(Dataset):
    """Training pictures, each several times, and each time changed a little, in the same way in every run.

    Rows are `levels` (3, side, side) uint8 and `label`, the number of the concept.

    Args:
        folder: With the designs' folders.
        concepts: What the pictures show.
        rows: At least so many.
    """

    def __init__(self, folder: Path, concepts: list[Concept], rows: int):
        number = {concept: i for i, concept in enumerate(concepts)}
        self.pictures = [
            (Image.open(folder / path).convert("RGB"), number[concept])
            for path, concept in training_pictures(concepts)
        ]
        self.repeats = -(-rows // len(self.pictures))

    def __len__(self) -> int:
        return self.repeats * len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        picture, label = self.pictures[index % len(self.pictures)]
        with torch.random.fork_rng([]):
            torch.manual_seed(index)
            return {"levels": pil_to_tensor(AUGMENTATION(picture)), "label": label}


def _stack(normalize: TileNormalizer, rows: list[dict]) -> dict[str, Tensor]:
    labels = torch.tensor([row["label"] for row in rows])
    return {"pixel_values": normalize(torch.stack([row["levels"] for row in rows])), "labels": labels}


def _conversations(normalize: TileNormalizer, pad_token_id: int, rows: list[dict]) -> dict[str, Tensor]:
    batch = pad(rows, pad_token_id)
    return batch | {"pixel_values": normalize(batch["pixel_values"])}


class AnswerTrainer(Trainer):
    """The Trainer on answers' tokens, whose logits alone are computed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs.pop("labels")[:, 1:]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        is_answer = targets != -100
        return F.cross_entropy(model.lm_head(hidden[is_answer]).float(), targets[is_answer])


def _train(
    model: nn.Module, phase: Phase, data: Dataset, collate: Callable, folder: Path, trainer_class: type = Trainer
) -> None:
    """Trains a model in place, from the folder's last checkpoint on if there is one. The loss curve stays in it."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=phase.batch_size,
        learning_rate=phase.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=phase.steps // 10,
        weight_decay=0.05,
        save_steps=phase.save_every,
        save_total_limit=2,
        logging_steps=max(1, phase.save_every // 10),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        seed=0,
    )
    trainer = trainer_class(
        model, args, data_collator=collate, train_dataset=data, callbacks=[MarkCompleteCheckpoints()]
    )
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    plot_losses(trainer.state.log_history, folder.name, folder.with_suffix(".png"))
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    partial_file = file.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial_file)
    partial_file.rename(file)
