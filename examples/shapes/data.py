"""Conversations about pictures as batches for training: token ids, labels on the answers, tiles.

    rows = Conversations(make_processor(), "train", seed=0)  # an endless stream
    batch = collate([next(iter(rows)), …])                 # input_ids, attention_mask, labels, pixel_values

A row asks several questions about the same pictures, which shares the work of seeing them. Its ids are those that
`chat()` makes, answers included.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mmmamba.processing_mmmamba import MmMambaProcessor, expand_placeholders

from .tokenizer import SYSTEM_MESSAGE
from .world import conversation


class Conversations(IterableDataset):
    """An endless, deterministic stream of conversations.

    Args:
        processor: Of the picture world.
        split: "train" or "test"; no picture occurs in both.
        seed: Which stream.
    """

    def __init__(self, processor: MmMambaProcessor, split: str = "train", seed: int = 0):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.split, self.seed, self.tokens_per_tile = split, seed, processor.tokens_per_tile
        ids = self.tokenizer.encode("assistant\n", add_special_tokens=False)
        self.answer_start = [self.tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids]
        self.answer_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        index, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            yield self.row(index)
            index += step

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`: `input_ids` and `labels` (length,), `pixel_values` (tiles, 3, size, size)."""
        pictures, turns = conversation(self.split, self.seed, index)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        places = "<image>" * len(pictures) + "\n"
        for question, answer in turns:
            messages.append({"role": "user", "content": places + question})
            messages.append({"role": "assistant", "content": answer})
            places = ""
        vision = self.image_processor([picture.draw() for picture in pictures], return_tensors="pt")
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False)
        (prompt,) = expand_placeholders([prompt], vision["num_patches"].tolist(), self.tokens_per_tile)
        ids = self.tokenizer(prompt)["input_ids"]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(self.labels(ids)),
            "pixel_values": vision["pixel_values"],
        }

    def labels(self, ids: list[int]) -> list[int]:
        """The ids of answers and of the tokens that end them; -100 elsewhere."""
        labels = [-100] * len(ids)
        head = len(self.answer_start)
        for start in range(len(ids) - head):
            if ids[start : start + head] == self.answer_start:
                end = ids.index(self.answer_end, start) + 1
                labels[start + head : end] = ids[start + head : end]
        return labels


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows to one batch, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), 2),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }
    for i, row in enumerate(rows):
        filled = len(row["input_ids"])
        batch["input_ids"][i, :filled] = row["input_ids"]
        batch["labels"][i, :filled] = row["labels"]
        batch["attention_mask"][i, :filled] = 1
    return batch


class Batches(IterableDataset):
    """Batches of rows of similar length, so that little of a batch is padding.

    Args:
        rows: The stream.
        batch_size: Rows per batch.
    """

    pool = 8  # batches that are sorted by length together

    def __init__(self, rows: Conversations, batch_size: int):
        self.rows, self.batch_size = rows, batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows, shuffle = iter(self.rows), torch.Generator().manual_seed(self.rows.seed)
        while True:
            drawn = sorted((next(rows) for _ in range(self.pool * self.batch_size)), key=lambda r: len(r["input_ids"]))
            for i in torch.randperm(self.pool, generator=shuffle).tolist():
                yield collate(drawn[i * self.batch_size : (i + 1) * self.batch_size])
