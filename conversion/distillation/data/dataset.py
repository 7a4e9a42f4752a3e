"""Conversations and documents as a PyTorch dataset: rows by number.

A record that cannot become a row is replaced by the next good one and named in that row's `bad_rows`.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .bad_rows import all_bad_message
from .documents import DocumentRows
from .encoding import ConversationEncoder
from .formats import BadRow
from .records import RecordFile, RecordTable


MAX_CONSECUTIVE_BAD_ROWS = 1000  # after as many the data are given up


class UnusableData(ValueError):
    """Data without anything to train on; says why in one sentence.

    Args:
        message: The sentence. A DataLoader raises its worker's error again with the whole traceback as the message, of
            which the last line is the sentence.
    """

    def __init__(self, message: str):
        super().__init__(message.rstrip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__name__}: "))


class ConversationDataset(Dataset):
    """Rows by number, of files and map-style datasets one after another. The same number gives the same row.

    Args:
        encoder: Makes rows of records; not needed if all sources are documents.
        sources: Records, or rows of documents, and how often each is read (a whole number), or the share below 1 of
            them, evenly spread.

    Attributes:
        num_records: How many different records, or rows of documents, are read.
    """

    def __init__(
        self,
        encoder: ConversationEncoder | None,
        sources: Sequence[tuple[RecordFile | RecordTable | DocumentRows, float]],
    ):
        self.encoder, self.sources = encoder, list(sources)
        sizes = [max(1, int(len(source) * repeat)) for source, repeat in self.sources]
        self._ends = list(itertools.accumulate(sizes))
        self.num_records = sum(min(size, len(source)) for size, (source, _) in zip(sizes, self.sources, strict=True))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row number `index`; see `ConversationEncoder` and `DocumentRows`. If it is bad, the next good one, after the
        last the first.

        Returns:
            The row, with `bad_rows`, a list of (name, reason), if there were any on the way to it.

        Raises:
            IndexError: if there is no such number.
            UnusableData: if `MAX_CONSECUTIVE_BAD_ROWS` records in a row, or all, are bad.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        bad: dict[str, str] = {}
        for step in range(min(len(self), MAX_CONSECUTIVE_BAD_ROWS)):
            source, number = self._locate((index + step) % len(self))
            try:
                row = source.read(number)
                if not isinstance(source, DocumentRows):
                    row = self.encoder(row, source.root, source.max_patches, source.any_path)
            except BadRow as error:
                bad[source.name(number)] = str(error)
            else:
                return with_bad_rows(row, bad)
        raise UnusableData(all_bad_message(bad))

    def _locate(self, index: int) -> tuple[RecordFile | RecordTable | DocumentRows, int]:
        """The source of row `index`, and the record's number in it."""
        source_index = bisect_right(self._ends, index)
        source, repeat = self.sources[source_index]
        offset = index - (self._ends[source_index - 1] if source_index else 0)
        if repeat >= 1:
            return source, offset % len(source)
        return source, offset * len(source) // max(1, int(len(source) * repeat))


def with_bad_rows(row: dict[str, Any], bad: dict[str, str]) -> dict[str, Any]:
    """A row with the bad rows in front of it, names and reasons, if there are any."""
    return row | {"bad_rows": list(bad.items())} if bad else row
