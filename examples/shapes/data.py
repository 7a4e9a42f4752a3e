"""Conversations about pictures as rows for training: token ids, labels on the answers, tiles.

    rows = Conversations(make_processor(), "train", seed=0)  # endless
    batch = pad([rows[0], rows[1]], pad_token_id=2)          # input_ids, attention_mask, labels, pixel_values

A row asks several questions about the same pictures, so that these are encoded once. Its token ids are those of
`chat()`, answers included.
"""

from abc import ABC, abstractmethod

import torch
from torch.utils.data import Dataset

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.processing_mmmamba import MmMambaProcessor

from .tokenizer import SYSTEM_MESSAGE
from .world import TRAINING, conversation


class EndlessDataset(Dataset, ABC):
    """Generated rows without end, the same for the same seed, in batches of similar length to avoid padding.

    A subclass generates row number `index` in `row(index)`. Rows must be read in sequence, as sorting them by length
    needs the neighbours of each.

    Args:
        seed: Of the order of batches.
        batch_size: Rows of similar length that follow each other.
    """

    ordered = True  # makes the distillation's trainer read sequentially
    pool = 8  # batches that are sorted by length together

    def __init__(self, seed: int = 0, batch_size: int = 1):
        self.seed, self.batch_size = seed, batch_size
        self._last_pool: tuple[int, list] = (-1, [])  # its number and rows

    def __len__(self) -> int:
        return 10**7  # samplers need a number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, position = divmod(index, self.pool * self.batch_size)
        if self._last_pool[0] != number:
            self._last_pool = number, self._pool(number)
        return self._last_pool[1][position]

    def _pool(self, number: int) -> list[dict[str, torch.Tensor]]:
        size = self.pool * self.batch_size
        rows = sorted(map(self.row, range(number * size, (number + 1) * size)), key=lambda row: len(row["input_ids"]))
        shuffle = torch.Generator().manual_seed(self.seed)
        for _ in range(number):
            torch.randperm(self.pool, generator=shuffle)
        batches = torch.randperm(self.pool, generator=shuffle).tolist()
        return [rows[batch * self.batch_size + i] for batch in batches for i in range(self.batch_size)]

    @abstractmethod
    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Row number `index`; see `ConversationEncoder`."""


class Conversations(EndlessDataset):
    """Conversations about the picture world.

    Args:
        processor: Of the picture world.
        split: "train" or "test"; no picture occurs in both.
        seed: Of the series.
        batch_size: Conversations of similar length that follow each other.
    """

    def __init__(self, processor: MmMambaProcessor, split: str = "train", seed: int = 0, batch_size: int = 1):
        super().__init__(seed, batch_size)
        self.encoder, self.split = ConversationEncoder(processor), split

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        pictures, turns = conversation(self.split, self.seed, index, **TRAINING)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        placeholders = "<image>" * len(pictures) + "\n"
        for question, answer in turns:
            messages.append({"role": "user", "content": placeholders + question})
            messages.append({"role": "assistant", "content": answer})
            placeholders = ""
        return self.encoder({"messages": messages, "images": [picture.draw() for picture in pictures]})
