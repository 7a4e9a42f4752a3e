"""Conversations about pictures as rows for training: token ids, labels on the answers, tiles.

    rows = Conversations(make_processor(), "train", seed=0)  # endless
    batch = pad([rows[0], rows[1]], pad_token_id=2)          # input_ids, attention_mask, labels, pixel_values

A row asks several questions about the same pictures, which shares the work of seeing them. Its ids are those that
`chat()` makes, answers included.
"""

from abc import ABC, abstractmethod

import torch
from torch.utils.data import Dataset

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.processing_mmmamba import MmMambaProcessor

from .tokenizer import SYSTEM_MESSAGE
from .world import TRAINING, conversation


class InOrder(Dataset, ABC):
    """An endless, deterministic series of rows, in batches of like length so that little of one is padding.

    A subclass makes row number `index` in `row(index)`.

    Args:
        seed: Of the order of batches.
        batch_size: Rows that go together.
    """

    ordered = True  # to be read from front to back
    pool = 8  # batches that are sorted by length together

    def __init__(self, seed: int = 0, batch_size: int = 1):
        self.seed, self.batch_size = seed, batch_size
        self._drawn: tuple[int, list] = (-1, [])  # the pool read last

    def __len__(self) -> int:
        return 10**7  # it never ends; samplers want a number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(index, self.pool * self.batch_size)
        if self._drawn[0] != number:
            self._drawn = number, self._pool(number)
        return self._drawn[1][place]

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


class Conversations(InOrder):
    """Conversations about the picture world.

    Args:
        processor: Of the picture world.
        split: "train" or "test"; no picture occurs in both.
        seed: Which series.
        batch_size: Conversations that go together.
    """

    def __init__(self, processor: MmMambaProcessor, split: str = "train", seed: int = 0, batch_size: int = 1):
        super().__init__(seed, batch_size)
        self.encoder, self.split = ConversationEncoder(processor), split

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        pictures, turns = conversation(self.split, self.seed, index, **TRAINING)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        places = "<image>" * len(pictures) + "\n"
        for question, answer in turns:
            messages.append({"role": "user", "content": places + question})
            messages.append({"role": "assistant", "content": answer})
            places = ""
        return self.encoder({"messages": messages, "images": [picture.draw() for picture in pictures]})
