"""Conversations and documents as PyTorch datasets: rows by number, or an endless stream.

A record that cannot become a row is replaced by the next good one and named in that row's `bad_rows`.
"""

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

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
                return _with_bad_rows(row, bad)
        raise UnusableData(all_bad_message(bad))

    def _locate(self, index: int) -> tuple[RecordFile | RecordTable | DocumentRows, int]:
        """The source of row `index`, and the record's number in it."""
        source_index = bisect_right(self._ends, index)
        source, repeat = self.sources[source_index]
        offset = index - (self._ends[source_index - 1] if source_index else 0)
        if repeat >= 1:
            return source, offset % len(source)
        return source, offset * len(source) // max(1, int(len(source) * repeat))


class ConversationStream(IterableDataset):
    """Rows of streaming datasets without end: one of each dataset in turn, shuffled anew in each epoch.

    All processes and DataLoader workers are readers. A dataset whose number of files is a multiple of the number of
    readers is split by files, any other record by record: then every reader passes over all records, but decodes its
    own only. Every record has one reader in each epoch. The same arguments give the same rows in the same order.

    Args:
        encoder: Makes rows of records.
        sources: Streaming datasets of the `datasets` library, what each is called in messages, the folder that image
            paths start at, and whether they may leave it.
        seed: Of the order.
        buffer_size: Records among which the next one is drawn; 0 keeps the order.
        num_processes, process_index: Processes that share the records, and which of them this is. Workers of a
            process's DataLoader share that process's records.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        sources: Sequence[tuple[Any, str, str | Path, bool]],
        seed: int = 0,
        buffer_size: int = 1000,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} must be at least 0 and below {num_processes}.")
        self.encoder, self.num_processes, self.process_index = encoder, num_processes, process_index
        self.sources = []
        for dataset, label, root, any_path in sources:
            # A damaged image that the dataset decodes ends the stream; one that the encoder decodes is a bad row.
            if dataset.features:
                dataset = dataset.cast(_without_decoding(dataset.features))
            if buffer_size:
                dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
            self.sources.append((dataset, label, root, any_path))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows; see `ConversationEncoder` and, for bad ones, `ConversationDataset`.

        Raises:
            UnusableData: if `MAX_CONSECUTIVE_BAD_ROWS` records in a row, or all of a dataset, are bad.
        """
        streams = [self._rows(*source) for source in self.sources]
        while True:
            for stream in streams:
                yield next(stream)

    def _rows(self, dataset: Any, label: str, root: str | Path, any_path: bool) -> Iterator[dict[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        worker = get_worker_info()
        num_workers, worker_index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        num_readers = self.num_processes * num_workers
        reader = self.process_index * num_workers + worker_index
        if worker is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # as `datasets` does in a worker: a lock that was held at the fork stays locked
        shard = split_dataset_by_node(dataset, reader, num_readers)
        bad: dict[str, str] = {}
        for epoch in itertools.count():
            shard.set_epoch(epoch)
            num_good = num_read = 0
            # `iter`, unlike the dataset's `__iter__`, does not split files between workers once more.
            for num_read, columns in enumerate(shard.iter(batch_size=1), start=1):
                record = {key: values[0] for key, values in columns.items()}
                try:
                    row = self.encoder(record, root, any_path=any_path)
                except BadRow as error:
                    record_id = record.get("id")
                    position = f"reader {reader} of {num_readers}, epoch {epoch}, record {num_read - 1}"
                    bad[f"{label}[{position if record_id is None else f'id {record_id}'}]"] = str(error)
                    if len(bad) == MAX_CONSECUTIVE_BAD_ROWS:
                        raise UnusableData(all_bad_message(bad)) from None
                else:
                    num_good += 1
                    yield _with_bad_rows(row, bad)
                    bad = {}
            if not num_read:
                raise UnusableData(f"{label} has fewer records than its {num_readers} readers; use fewer workers.")
            if not num_good:
                raise UnusableData(all_bad_message(bad))


def _without_decoding(feature: Any) -> Any:
    """Features of a dataset whose images stay bytes or paths. (`decode(False)` would leave JSON encoded, too.)"""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: _without_decoding(value) for key, value in feature.items()})
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_without_decoding(feature.feature))
    return feature


def _with_bad_rows(row: dict[str, Any], bad: dict[str, str]) -> dict[str, Any]:
    return row | {"bad_rows": list(bad.items())} if bad else row
