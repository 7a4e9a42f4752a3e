"""Conversations of streaming datasets as an endless PyTorch dataset whose position can be saved and loaded.

`datasets` can tell where it stands in a file, but not what its own shuffle buffer holds. So its records are shuffled
in blocks here: a position is where a block begins and how much of it was used. To load one, a reader skips within the
files that were open and reads at most one block again; it decodes nothing that was used.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .bad_rows import all_bad_message
from .dataset import MAX_CONSECUTIVE_BAD_ROWS, UnusableData, with_bad_rows
from .encoding import ConversationEncoder
from .formats import BadRow


OPEN_FILES = 10  # of a dataset that is shuffled, read in turn


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
        buffer_size: Records that are shuffled among each other; 0 keeps the order.
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
        self.encoder, self.seed, self.buffer_size = encoder, seed, buffer_size
        self.num_processes, self.process_index = num_processes, process_index
        self.sources = []
        for dataset, label, root, any_path in sources:
            # A damaged image that the dataset decodes ends the stream; one that the encoder decodes is a bad row.
            if dataset.features:
                dataset = dataset.cast(_without_decoding(dataset.features))
            self.sources.append((dataset, label, root, any_path))
        self._state: dict[str, Any] | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begins at a position of `StreamLoader.state_dict`, with that many readers."""
        self._state = state

    def num_workers(self, wanted: int) -> int:
        """How many workers a DataLoader can have: those that are `wanted`, or after `load_state_dict` the largest
        number below by which that position's readers can be divided, so that the order stays."""
        readers = wanted if self._state is None else len(self._state["readers"])
        return next((n for n in range(min(wanted, readers), 0, -1) if readers % n == 0), 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows; see `ConversationEncoder` and, for bad ones, `ConversationDataset`.

        Raises:
            UnusableData: if `MAX_CONSECUTIVE_BAD_ROWS` records in a row, or all of a dataset, are bad.
        """
        return (row for row, _ in self.rows_and_positions())

    def rows_and_positions(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yields this worker's rows, each with its reader's position behind it."""
        worker = get_worker_info()
        num_workers, worker_index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if worker is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # as `datasets` does in a worker: a lock that was held at the fork stays locked
        state = self.first_state(num_workers) if self._state is None else self._state
        num_readers = len(state["readers"])
        # A DataLoader takes rows from its workers in turn, and these take them from their readers in turn.
        first = state["rows"] + worker_index
        mine = [index for index in range(num_readers) if (index - first) % num_workers == 0]
        readers = {index: self._reader(index, num_readers, state["readers"][index]) for index in mine}
        for number in itertools.count(first, num_workers):
            yield next(readers[number % num_readers])

    @staticmethod
    def first_state(num_workers: int) -> dict[str, Any]:
        """The position before the first row, with a reader per worker."""
        return {"rows": 0, "readers": [None] * max(1, num_workers)}

    def _reader(self, index: int, readers_per_process: int, position: dict[str, Any] | None):
        """Yields rows of all sources in turn, and the position behind each."""
        number = self.process_index * readers_per_process + index
        num_readers = self.num_processes * readers_per_process
        position = position or {"turn": 0, "sources": [None] * len(self.sources)}
        readers = [
            _SourceReader(self, source, number, num_readers, state)
            for source, state in zip(self.sources, position["sources"], strict=True)
        ]
        for turn in itertools.count(position["turn"]):
            row = next(readers[turn % len(readers)])
            turn = (turn + 1) % len(readers)
            yield row, {"turn": turn, "sources": [reader.state_dict() for reader in readers]}


class StreamLoader:
    """Batches of a stream, of which it knows how far they reach.

    Rows travel from the workers one by one and become batches here, so that neither the rows nor their order depend on
    how many of them are in a batch.

    Args:
        stream: Read by as many workers as it allows, see `ConversationStream.num_workers`.
        batch_size: Rows per batch.
        collate: From a list of rows to a batch.
        num_workers: Processes that read and decode; 0 does so in this one.
    """

    def __init__(
        self,
        stream: ConversationStream,
        batch_size: int,
        collate: Callable[[list[dict]], dict],
        num_workers: int = 0,
    ):
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.num_workers = stream.num_workers(num_workers)
        state = stream.first_state(self.num_workers) if stream._state is None else stream._state
        self._rows, self._readers = state["rows"], list(state["readers"])

    def state_dict(self) -> dict[str, Any]:
        """Rows so far and each reader's position, as `ConversationStream.load_state_dict` takes them."""
        return {"rows": self._rows, "readers": list(self._readers)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.stream.load_state_dict(self.state_dict())
        # Four batches wait ready, over all workers.
        prefetch = -(-4 * self.batch_size // self.num_workers) if self.num_workers else None
        rows = DataLoader(
            _RowsAndPositions(self.stream),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=prefetch,
            generator=torch.Generator(),  # else it would draw from that of the training
        )
        batch = []
        for row, position in rows:
            self._readers[self._rows % len(self._readers)] = position
            self._rows += 1
            batch.append(row)
            if len(batch) == self.batch_size:
                yield self.collate(batch)
                batch = []


class _RowsAndPositions(IterableDataset):
    def __init__(self, stream: ConversationStream):
        self.stream = stream

    def __iter__(self):
        return self.stream.rows_and_positions()


class _SourceReader:
    """One reader's rows of one dataset, without end."""

    def __init__(self, stream: ConversationStream, source: tuple, reader: int, num_readers: int, state: dict | None):
        self.dataset, self.label, self.root, self.any_path = source
        self.encoder, self.seed, self.buffer_size = stream.encoder, stream.seed, stream.buffer_size
        self.reader, self.num_readers = reader, num_readers
        if state is None:
            self._begin_epoch(0)
        else:
            # `number` and `records` are those at the block's start, `used` is how much of the block was.
            self.epoch, self.number, self.good = state["epoch"], state["number"], state["good"]
            self._records = self._open_epoch(state["records"])
            self._read_block()
            self._used = state["used"]

    def state_dict(self) -> dict[str, Any]:
        names = ("epoch", "number", "good")
        state = {name: getattr(self, name) for name in names}
        return state | {"records": self._block_start, "used": self._used}

    def __next__(self) -> dict[str, Any]:
        bad: dict[str, str] = {}
        while True:
            if self._used == len(self._block):
                self.number += len(self._block)
                self._read_block()
            if not self._block:
                if not self.number:
                    raise UnusableData(
                        f"{self.label} has fewer records than its {self.num_readers} readers; use fewer workers."
                    )
                if not self.good:
                    raise UnusableData(all_bad_message(bad))
                self._begin_epoch(self.epoch + 1)
                continue
            record, number = self._block[self._used], self.number + self._used
            self._used += 1
            try:
                row = self.encoder(record, self.root, any_path=self.any_path)
            except BadRow as error:
                record_id = record.get("id")
                position = f"reader {self.reader} of {self.num_readers}, epoch {self.epoch}, record {number}"
                bad[f"{self.label}[{position if record_id is None else f'id {record_id}'}]"] = str(error)
                if len(bad) == MAX_CONSECUTIVE_BAD_ROWS:
                    raise UnusableData(all_bad_message(bad)) from None
            else:
                self.good += 1
                return with_bad_rows(row, bad)

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.number, self.good = epoch, 0, 0
        self._records = self._open_epoch(None)
        self._read_block()

    def _open_epoch(self, state: dict | None) -> "_Records":
        files = list(range(self.dataset.num_shards))
        if self.buffer_size:
            files = np.random.default_rng((self.seed, self.epoch)).permutation(files).tolist()
        by_file = len(files) % self.num_readers == 0
        if by_file:
            files = files[self.reader :: self.num_readers]
        step, offset = (1, 0) if by_file else (self.num_readers, self.reader)
        return _Records(self.dataset, files, OPEN_FILES if self.buffer_size else 1, step, offset, state)

    def _read_block(self) -> None:
        self._block_start, self._used = self._records.state_dict(), 0
        block = list(itertools.islice(self._records, max(1, self.buffer_size)))
        order = np.random.default_rng((self.seed, self.epoch, self.reader, self.number)).permutation(len(block))
        self._block = [block[i] for i in order]


class _Records:
    """Records of a dataset's files, a few of which are read in turn, or every `step`-th of them from `offset` on."""

    def __init__(self, dataset: Any, files: list[int], open_files: int, step: int, offset: int, state: dict | None):
        self.dataset, self.files, self.open_files, self.step, self.offset = dataset, files, open_files, step, offset
        state = state or {"passed": 0, "begun": 0, "turn": 0, "open": []}
        self.passed, self.begun, self.turn = state["passed"], state["begun"], state["turn"]
        self._open = [_File(dataset, *one) for one in state["open"]]

    def state_dict(self) -> dict[str, Any]:
        names = ("passed", "begun", "turn")
        return {name: getattr(self, name) for name in names} | {"open": [file.state_dict() for file in self._open]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            record = self._next_record()
            self.passed += 1
            if (self.passed - 1) % self.step == self.offset:
                return record

    def _next_record(self) -> dict[str, Any]:
        while True:
            while len(self._open) < self.open_files and self.begun < len(self.files):
                self._open.append(_File(self.dataset, self.files[self.begun]))
                self.begun += 1
            if not self._open:
                raise StopIteration
            self.turn %= len(self._open)
            try:
                record = next(self._open[self.turn])
            except StopIteration:
                del self._open[self.turn]
                continue
            self.turn += 1
            return record


class _File:
    """Records of one file (shard) of a dataset, from a position of its own on."""

    def __init__(self, dataset: Any, index: int, state: dict | None = None):
        self.index, self._state = index, state
        self._shard = dataset.shard(num_shards=dataset.num_shards, index=index)
        if state is not None:
            self._shard.load_state_dict(state)
        # `iter`, unlike the dataset's `__iter__`, does not split files between workers once more.
        self._records = self._shard.iter(batch_size=1)
        self._begun = False

    def __next__(self) -> dict[str, Any]:
        columns = next(self._records)
        self._begun = True
        return {key: values[0] for key, values in columns.items()}

    def state_dict(self) -> tuple[int, dict | None]:
        return self.index, self._shard.state_dict() if self._begun else self._state


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
