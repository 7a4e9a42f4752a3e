"""A length curriculum: rows of documents are short in a stage's first steps and longer in later ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, RandomSampler, Sampler

from .dataset import ConversationDataset


class LengthCurriculum(Dataset):
    """Rows of a dataset once per length, those of documents cut into rows of that length.

    So every step reads as many tokens as one with the longest rows (arXiv 2405.13226 keeps that number, too): memory
    and learning rate fit all lengths, and documents and conversations are mixed as without a curriculum.

    Args:
        dataset: Its rows of documents have the longest of the lengths.
        row_tokens: The lengths, from short to long.

    Attributes:
        num_records: See `ConversationDataset`.
    """

    def __init__(self, dataset: ConversationDataset, row_tokens: Sequence[int]):
        self.dataset, self.row_tokens, self.num_records = dataset, list(row_tokens), dataset.num_records

    def __len__(self) -> int:
        return len(self.dataset) * len(self.row_tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index % len(dataset)` of the dataset at length number `index // len(dataset)`.

        Returns:
            The row, or `rows` that it is cut into, with its `bad_rows` if there are any.
        """
        number, index = divmod(index, len(self.dataset))
        row, length = self.dataset[index], self.row_tokens[number]
        ids, labels = row["input_ids"], row["labels"]
        is_document = labels[0] != -100  # a conversation begins with a question
        if not is_document or len(ids) <= length:
            return row
        pieces = [
            {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
            for start in range(0, len(ids) - 1, length)  # nothing in a single last token is predicted
        ]
        return {"rows": pieces} | {key: row[key] for key in ("bad_rows",) if key in row}


class CurriculumSampler(Sampler):
    """The indices of a whole run over a `LengthCurriculum`: every row once per epoch, each epoch in another order.

    Args:
        curriculum: Its lengths share the steps evenly, one after the other.
        steps: Of the run.
        rows_per_step: Rows of the longest length.
        seed: Of the order.
    """

    def __init__(self, curriculum: LengthCurriculum, steps: int, rows_per_step: int, seed: int):
        self.curriculum, self.steps, self.rows_per_step, self.seed = curriculum, steps, rows_per_step, seed

    def __len__(self) -> int:
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        dataset, generator = self.curriculum.dataset, torch.Generator().manual_seed(self.seed)
        for position, index in enumerate(RandomSampler(dataset, num_samples=len(self), generator=generator)):
            number = position // self.rows_per_step * len(self.curriculum.row_tokens) // self.steps
            yield number * len(dataset) + index
