"""Stage 3 on answers that the student writes itself (GKD, arXiv 2306.13649, algorithm 1).

Teacher and student are then compared where the student leads, not only where the data do.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import GenerationConfig

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


NEEDS_WHOLE_WEIGHTS = (
    "on_policy lets every process write answers of its own, which needs whole weights on each; start without FSDP "
    "(several GPUs without sharding, or ZeRO-2), or set on_policy=0."
)


@dataclass(frozen=True)
class AnswerWriter:
    """Replaces the answers of some micro-batches by the student's own.

    The same seed, step, micro-batch and process give the same choice and the same random numbers.

    Attributes:
        share: Of the micro-batches.
        max_new_tokens: Of an answer.
        temperature: Of sampling, from the whole distribution; 0 for greedy answers.
        end_tokens: Ids that end an answer; they belong to it.
        pad_token_id: Fills the prompts of a batch.
        collate: From rows to a batch.
        seed: Of choices and samples.
        process_index: Which of the processes this is.
        normalize: From the tiles of a batch to those that models read.
    """

    share: float
    max_new_tokens: int
    temperature: float
    end_tokens: Collection[int]
    pad_token_id: int
    collate: Callable[[list[dict]], dict]
    seed: int
    process_index: int = 0
    normalize: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, student: MmMambaForConditionalGeneration, batch: dict[str, Any], step: int, index: int
    ) -> dict[str, Any]:
        """The batch, or one with the same prompts and the student's answers.

        Args:
            student: Writes; afterwards it is in the mode (training or not) that it was in.
            batch: Of `pad` or `pack`.
            step: Optimiser steps done.
            index: Of the micro-batch in the step.

        Returns:
            A batch of the same kind. If the answers are the student's, `labels` are -100 everywhere, for nothing says
            what is right there, and `answer_mask` (batch, length) bool is true on the answers' tokens.
        """
        choice = random.Random(f"{self.seed} {step} {index} {self.process_index}")
        if choice.random() >= self.share:
            return batch
        device, config = batch["input_ids"].device, student.config
        prompts = [cut_to_prompt(row, config) for row in split_rows(batch, config)]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(choice.getrandbits(63))
            answers = self._write(student, prompts)
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.cat([prompt["input_ids"], answer])
            labels = ids.clone()
            labels[: len(prompt["input_ids"])] = -100
            rows.append(prompt | {"input_ids": ids, "labels": labels})
        written = self.collate(rows)
        written["answer_mask"] = written["labels"] != -100
        written["labels"] = torch.full_like(written["labels"], -100)
        return send_to_device(written, device)

    def _write(self, student: MmMambaForConditionalGeneration, prompts: list[dict[str, Tensor]]) -> list[Tensor]:
        """Ids of each prompt's answer, (length,) int64 each, with the token that ends it."""
        lengths = [len(prompt["input_ids"]) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths)), self.pad_token_id, device=prompts[0]["input_ids"].device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -lengths[row] :] = prompt["input_ids"]
            mask[row, -lengths[row] :] = 1
        tiles = [prompt["pixel_values"] for prompt in prompts if len(prompt.get("pixel_values", ()))]
        pixel_values = torch.cat(tiles) if tiles else None
        if tiles and self.normalize is not None:
            pixel_values = self.normalize(pixel_values)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        options = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.end_tokens) or None,
            pad_token_id=self.pad_token_id,
            disable_compile=True,  # weights change before the next call, so a recorded graph would serve one only
            **(sampling if self.temperature else {"do_sample": False}),
        )
        training = student.training
        student.eval()
        try:
            written = student.generate(
                ids,
                options,
                attention_mask=mask,
                pixel_values=pixel_values,
            )
        finally:
            student.train(training)
        answers = []
        for answer in written[:, ids.shape[1] :]:
            ends = torch.isin(answer, torch.tensor(sorted(self.end_tokens), device=answer.device)).nonzero()[:, 0]
            answers.append(answer[: int(ends[0]) + 1] if len(ends) else answer)
        return answers


def split_rows(batch: dict[str, Any], config: Any) -> list[dict[str, Tensor]]:
    """A batch of `pad` or `pack` as rows: `input_ids`, `labels` and, if the batch has them, `pixel_values`."""
    ids, labels = batch["input_ids"], batch["labels"]
    if batch.get("attention_mask") is not None:
        valid = batch["attention_mask"].bool()
        rows = [{"input_ids": i[v], "labels": x[v]} for i, x, v in zip(ids, labels, valid, strict=True)]
    else:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        parts = (tensor[0].tensor_split(starts[1:]) for tensor in (ids, labels))
        rows = [{"input_ids": i, "labels": x} for i, x in zip(*parts, strict=True)]
    if batch.get("pixel_values") is not None:
        tiles = batch["pixel_values"].split([_num_tiles(row["input_ids"], config) for row in rows])
        rows = [row | {"pixel_values": of_row} for row, of_row in zip(rows, tiles, strict=True)]
    return rows


def cut_to_prompt(row: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The row up to its first answer; of a document, all of which is labelled, the first half."""
    ids = row["input_ids"]
    labelled = (row["labels"] != -100).nonzero()[:, 0]
    first = int(labelled[0]) if len(labelled) else len(ids)
    if first <= 1:  # in a packed row the first label of a document is left out, too
        first = max(1, len(ids) // 2)
    prompt = {"input_ids": ids[:first]}
    if "pixel_values" in row:
        prompt["pixel_values"] = row["pixel_values"][: _num_tiles(ids[:first], config)]
    return prompt


def _num_tiles(ids: Tensor, config: Any) -> int:
    return int((ids == config.image_token_id).sum()) // config.tokens_per_tile
