"""Conversations about pictures as batches for training: token ids, labels on the answers, tiles.

    rows = Conversations(make_processor(), "train", seed=0)  # endless
    batch = pad([rows[0], rows[1]], pad_token_id=2)        # input_ids, attention_mask, labels, pixel_values

A row asks several questions about the same pictures, which shares the work of seeing them. Its ids are those that
`chat()` makes, answers included.
"""

import torch
from torch.utils.data import Dataset

from mmmamba.processing_mmmamba import MmMambaProcessor, expand_placeholders

from .tokenizer import SYSTEM_MESSAGE
from .world import conversation


class Conversations(Dataset):
    """An endless, deterministic series of conversations, in batches of like length so that little of one is padding.

    Args:
        processor: Of the picture world.
        split: "train" or "test"; no picture occurs in both.
        seed: Which series.
        batch_size: Conversations that go together.
    """

    ordered = True  # to be read from front to back
    pool = 8  # batches that are sorted by length together

    def __init__(self, processor: MmMambaProcessor, split: str = "train", seed: int = 0, batch_size: int = 1):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.split, self.seed, self.tokens_per_tile = split, seed, processor.tokens_per_tile
        self.batch_size = batch_size
        ids = self.tokenizer.encode("assistant\n", add_special_tokens=False)
        self.answer_start = [self.tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids]
        self.answer_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
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
