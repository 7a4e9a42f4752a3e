"""`mmmamba distill R --check-data N`: reads rows as a run would, and says what they are like, without training."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from .bad_rows import BadRowCounter
from .curriculum import LengthCurriculum
from .stream import ConversationStream, StreamLoader


# What differs between two rows with the same fault: paths, numbers, quoted text.
_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S*\.\w{2,4}\b|\d[\d.,]*")


@dataclass
class DataReport:
    """What rows are like.

    Args:
        max_share: Largest share of bad rows that the recipe allows.
        num_records: Different records of the whole dataset, if known.
        tokens: Of each row, those of images included.
        answers: How many tokens of each row are labels.
        tiles: Of each row.
        bad: Name and reason of each bad row that was met on the way.
    """

    max_share: float
    num_records: int | None = None
    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Counts one row of a dataset."""
        self.tokens.append(len(row["input_ids"]))
        self.answers.append(int((row["labels"] != -100).sum()))
        self.tiles.append(len(row.get("pixel_values", ())))
        self.bad |= dict(row.get("bad_rows", []))

    def reasons(self) -> list[tuple[str, int, str]]:
        """Each reason with its details left out, how many rows have it, and the first one; the most frequent first."""
        counts, first = Counter(), {}
        for name, reason in self.bad.items():
            kind = _DETAILS.sub("…", reason)
            counts[kind] += 1
            first.setdefault(kind, f"{name}: {reason}")
        return [(kind, count, first[kind]) for kind, count in counts.most_common()]

    def __str__(self) -> str:
        rows, bad = len(self.tokens), len(self.bad)
        lines = [f"rows read        {rows:,}", f"bad rows         {bad:,} ({bad / (rows + bad):.2%})"]
        for kind, count, example in self.reasons():
            lines += [f"{count:17,}  {kind}", f"{'':19}such as {example}"]
        for name, values in (("tokens", self.tokens), ("answers' tokens", self.answers), ("tiles", self.tiles)):
            lines.append(f"{name:17}{sum(values) / rows:,.1f} on average, at most {max(values):,}")
        counter = BadRowCounter(self.max_share, num_records=self.num_records)
        counter.add(self.bad.items())
        try:
            counter.check(rows)
        except ValueError:
            lines.append(f"A run would stop: it allows bad_share={self.max_share:.2%}.")
        return "\n".join(lines)


def check_data(dataset, num_rows: int, seed: int, workers: int, max_share: float) -> DataReport:
    """Reads rows: the first ones of a stream or of generated data, else drawn at random, each at most once.

    Args:
        dataset: See `TrainingData.for_stage`.
        num_rows: How many to read, or fewer if there are fewer.
        seed: Of the draw.
        workers: Processes that read.
        max_share: See `DataReport`.

    Raises:
        UnusableData: if no row is good.
    """
    if isinstance(dataset, LengthCurriculum):
        dataset = dataset.dataset  # of the longest rows
    report = DataReport(max_share, getattr(dataset, "num_records", None))
    for row in _rows(dataset, num_rows, seed, workers):
        report.add(row)
    return report


def _rows(dataset, num_rows: int, seed: int, workers: int) -> Iterator[dict[str, Any]]:
    if isinstance(dataset, ConversationStream):
        return islice(StreamLoader(dataset, 1, _only, workers), num_rows)
    num_rows = min(num_rows, len(dataset))
    indices = range(num_rows)
    if not getattr(dataset, "ordered", False):
        generator = torch.Generator().manual_seed(seed)
        indices = list(islice(RandomSampler(dataset, generator=generator), num_rows))
    return iter(DataLoader(Subset(dataset, indices), batch_size=None, num_workers=workers))


def _only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = rows
    return row
