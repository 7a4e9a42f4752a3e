"""Conversations of users as training rows: from files and from datasets of the Hugging Face Hub, whole or streamed.

    rows = open_data([{"file": "train.jsonl", "root": "images"}], processor, max_tokens=8192)
    batch = pad([rows[0], rows[1]], pad_token_id=2)  # input_ids, attention_mask, labels, pixel_values

A record that cannot become a row is replaced by the next good one and named in that row's `bad_rows`; `BadRows` counts
them and stops a run that meets too many. Formats are in `records`, the way to ids and labels in `encoding`.
"""

import dataclasses
import difflib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mmmamba.processing_mmmamba import MmMambaProcessor

from .encoding import ConversationEncoder
from .recipe import resolve
from .records import BadRow, RecordFile, RecordTable, checked_repeat, open_files


__all__ = [
    "BadRow",
    "BadRows",
    "ConversationEncoder",
    "ConversationRows",
    "ConversationStream",
    "UnusableData",
    "check_entry",
    "open_data",
    "pack",
    "pad",
]

FILE_KEYS = ("file", "root", "repeat")
DATASET_KEYS = ("dataset", "name", "split", "streaming", "data_files", "data_dir", "revision", "root", "repeat")
PATIENCE = 1000  # bad records in a row after which nobody looks for a good one any more
_NAME = re.compile(r".*?(?::\d+|\[[^\]]*\])(?=: )")  # of a record, as it starts a message about it


class UnusableData(ValueError):
    """Data without anything to train on; says why in one sentence.

    Args:
        message: The sentence. A DataLoader raises what its worker raised again, with a whole traceback as the message,
            of which the last line is the sentence.
    """

    def __init__(self, message: str):
        super().__init__(message.rstrip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__name__}: "))


class ConversationRows(Dataset):
    """Rows by number, of files and map-style datasets one after another. The same number gives the same row.

    Args:
        encoder: Makes rows of records.
        sources: Records, and how often each is read (a whole number), or the share below 1 of them, evenly spread.

    Attributes:
        records: How many different records are read.
    """

    def __init__(self, encoder: ConversationEncoder, sources: Sequence[tuple[RecordFile | RecordTable, float]]):
        self.encoder, self.sources = encoder, list(sources)
        sizes = [max(1, int(len(source) * repeat)) for source, repeat in self.sources]
        self._ends = list(itertools.accumulate(sizes))
        self.records = sum(min(size, len(source)) for size, (source, _) in zip(sizes, self.sources, strict=True))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row number `index`; see `ConversationEncoder`. If it is bad, the next good one, after the last the first.

        Returns:
            The row, with `bad_rows`, a list of `name: reason`, if there were any on the way to it.

        Raises:
            IndexError: if there is no such number.
            UnusableData: if a thousand records in a row, or all, are bad.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        bad: dict[str, str] = {}
        for step in range(min(len(self), PATIENCE)):
            source, number = self._record((index + step) % len(self))
            try:
                row = self.encoder(source.read(number), source.root, source.max_patches)
            except BadRow as error:
                bad[source.name(number)] = str(error)
            else:
                return _with_bad_rows(row, bad)
        raise UnusableData(_hopeless(bad))

    def _record(self, index: int) -> tuple[RecordFile | RecordTable, int]:
        which = bisect_right(self._ends, index)
        source, repeat = self.sources[which]
        place = index - (self._ends[which - 1] if which else 0)
        if repeat >= 1:
            return source, place % len(source)
        return source, place * len(source) // max(1, int(len(source) * repeat))


class ConversationStream(IterableDataset):
    """Rows of streaming datasets without end: one of each dataset in turn, shuffled anew each time it starts again.

    All processes and DataLoader workers are readers. A dataset whose files are a multiple of the readers is dealt out
    file by file, any other record by record: then every reader passes over all records, but only its own are decoded.
    Every record has one reader in each pass. The same arguments give the same rows in the same order.

    Args:
        encoder: Makes rows of records.
        sources: Streaming datasets of the `datasets` library, what each is called in messages, and the folder that
            image paths start at.
        seed: Of the order.
        buffer_size: Records among which the next one is drawn; 0 keeps the order.
        num_processes, process_index: Processes that share the records, and which of them this is. Workers of a
            process's DataLoader share that process's records.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        sources: Sequence[tuple[Any, str, str | Path]],
        seed: int = 0,
        buffer_size: int = 1000,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} must be at least 0 and below {num_processes}.")
        self.encoder, self.num_processes, self.process_index = encoder, num_processes, process_index
        self.sources = []
        for dataset, label, root in sources:
            # A damaged picture that the dataset decodes ends the stream; one that is decoded here is a bad row.
            if dataset.features:
                dataset = dataset.cast(_undecoded(dataset.features))
            if buffer_size:
                dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
            self.sources.append((dataset, label, root))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields rows; see `ConversationEncoder` and, for bad ones, `ConversationRows`.

        Raises:
            UnusableData: if a thousand records in a row, or all of a dataset, are bad.
        """
        streams = [self._rows(*source) for source in self.sources]
        while True:
            for stream in streams:
                yield next(stream)

    def _rows(self, dataset: Any, label: str, root: str | Path) -> Iterator[dict[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        worker = get_worker_info()
        workers, worker_index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        readers, reader = self.num_processes * workers, self.process_index * workers + worker_index
        if worker is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # as `datasets` does in a worker: a lock held at the fork would never open
        part = split_dataset_by_node(dataset, reader, readers)
        bad: dict[str, str] = {}
        for epoch in itertools.count():
            part.set_epoch(epoch)
            good = read = 0
            # `iter`, unlike the dataset's `__iter__`, does not deal out files to workers once more.
            for read, columns in enumerate(part.iter(batch_size=1), start=1):
                record = {key: values[0] for key, values in columns.items()}
                try:
                    row = self.encoder(record, root)
                except BadRow as error:
                    known = record.get("id")
                    place = f"reader {reader} of {readers}, pass {epoch}, record {read - 1}"
                    bad[f"{label}[{place if known is None else f'id {known}'}]"] = str(error)
                    if len(bad) == PATIENCE:
                        raise UnusableData(_hopeless(bad)) from None
                else:
                    good += 1
                    yield _with_bad_rows(row, bad)
                    bad = {}
            if not read:
                raise UnusableData(f"{label} has fewer records than its {readers} readers; use fewer workers.")
            if not good:
                raise UnusableData(_hopeless(bad))


def _undecoded(feature: Any) -> Any:
    """Features of a dataset whose images stay bytes or paths. (`decode(False)` would leave JSON encoded, too.)"""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: _undecoded(value) for key, value in feature.items()})
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return feature


def _with_bad_rows(row: dict[str, Any], bad: dict[str, str]) -> dict[str, Any]:
    return row | {"bad_rows": [f"{name}: {reason}" for name, reason in bad.items()]} if bad else row


def _hopeless(bad: dict[str, str]) -> str:
    first = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(bad.items(), 3))
    return f"{len(bad)} records in a row are bad and none is good; the first are {first}. Repair or remove them."


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Rows to one batch, padded on the right.

    Args:
        rows: See `ConversationEncoder`.
        pad_token_id: Fills `input_ids`.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, length) int64; `pixel_values` (tiles, 3, size, size) fp32, of
        all rows in order, if there are any; `bad_rows`, a list of str, if there are any.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
    }
    for i, row in enumerate(rows):
        filled = len(row["input_ids"])
        batch["input_ids"][i, :filled] = row["input_ids"]
        batch["labels"][i, :filled] = row["labels"]
        batch["attention_mask"][i, :filled] = 1
    return batch | _shared(rows)


def pack(rows: Sequence[dict[str, Any]], pad_token_id: int | None = None) -> dict[str, Any]:
    """Rows to one sequence without padding, which `position_ids` cut into the rows again.

    Args:
        rows: See `ConversationEncoder`.
        pad_token_id: Not used; there so that `pad` and `pack` are called alike.

    Returns:
        `input_ids`, `position_ids`, from 0 in each row, and `labels`, -100 where a row starts, (1, total) int64;
        `pixel_values` and `bad_rows` as of `pad`.
    """
    labels = [row["labels"].clone() for row in rows]
    for row_labels in labels:
        row_labels[0] = -100  # the token before it is another row's
    packed: dict[str, Tensor] = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": torch.cat(labels)[None],
    }
    return packed | _shared(rows)


def _shared(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tiles = torch.cat([row["pixel_values"] for row in rows])
    bad = [message for row in rows for message in row.get("bad_rows", [])]
    return ({"pixel_values": tiles} if len(tiles) else {}) | ({"bad_rows": bad} if bad else {})


class BadRows:
    """Counts bad rows, each once however often it is met, and stops a run that meets too many.

    Args:
        max_share: Largest share of bad rows among the rows seen.
        file: JSON Lines file that gets each bad row once: `row`, `reason`, and the rows `seen` before it. Those of an
            earlier part of the run count.
        writes: Whether this process writes the file; all of them read it.
        seen: Rows seen before the run was interrupted. What the file names after that will be met again.
        size: Different records of the whole dataset, if known; rows beyond are those seen again.
        patience: Rows to see before the share counts, or the whole dataset if it is smaller.
        shown: Bad rows that a message quotes.
    """

    def __init__(
        self,
        max_share: float = 0.01,
        file: str | Path | None = None,
        writes: bool = True,
        size: int | None = None,
        patience: int = 100,
        shown: int = 3,
        seen: int = 0,
    ):
        if not 0 <= max_share <= 1:
            raise ValueError(f"The largest share of bad rows is {max_share}; give one from 0 to 1.")
        self.max_share, self.size, self.shown = max_share, size, shown
        self.patience = patience if size is None else min(patience, size)
        self.file, self.writes = None if file is None else Path(file), writes
        self._seen = seen
        there = self.file is not None and self.file.is_file()
        lines = [line for line in _lines_in(self.file) if line["seen"] < seen] if there else []
        self._names = {line["row"] for line in lines}
        self.first = [f"{line['row']}: {line['reason']}" for line in lines[:shown]]
        self._kept: list[dict] | None = lines  # until the file is written, then none: it is appended to

    @property
    def count(self) -> int:
        """Different bad rows that were added."""
        return len(self._names)

    def add(self, messages: Iterable[str]) -> int:
        """Counts the `bad_rows` of a batch. Returns how many are new."""
        before, lines = len(self._names), []
        for message in messages:
            match = _NAME.match(message)
            name = match[0] if match else message
            if name in self._names:
                continue
            self._names.add(name)
            if len(self.first) < self.shown:
                self.first.append(message)
            reason = message[len(name) :].removeprefix(": ")
            lines.append({"row": name, "reason": reason, "seen": self._seen})
        if lines and self.file is not None and self.writes:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a" if self._kept is None else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in [*(self._kept or []), *lines])
            self._kept = None
        return len(self._names) - before

    def check(self, seen_rows: int) -> None:
        """Stops the run if too many rows are bad.

        Until the whole dataset was seen, a few more than the share are put down to chance: three standard deviations.

        Args:
            seen_rows: Rows seen since the last check.

        Raises:
            ValueError: if their share is above the limit.
        """
        self._seen += seen_rows
        whole = self.size is not None and self._seen >= self.size
        seen = self.size if whole else self._seen
        allowed = self.max_share * seen
        if seen < max(1, self.patience) or self.count <= allowed + (0 if whole else 3 * allowed**0.5):
            return
        first = "; ".join(self.first)
        listed = "" if self.file is None else f" (all of them are in {self.file})"
        raise ValueError(
            f"{self.count} bad rows among {seen} rows ({self.count / seen:.2%}) are more than the "
            f"{self.max_share:.2%} that is allowed; the first are {first}{listed}; "
            "repair or remove them, or allow a larger share."
        )


def _lines_in(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            yield {"row": line["row"], "reason": line["reason"], "seen": line["seen"]}
        except (ValueError, TypeError, KeyError):  # half a line, of a run that was killed
            continue


def open_data(
    spec: Sequence[dict[str, Any]] | dict[str, Any],
    processor: MmMambaProcessor,
    max_tokens: int | None = None,
    seed: int = 0,
    buffer_size: int = 1000,
    num_processes: int | None = None,
    process_index: int | None = None,
) -> ConversationRows | ConversationStream:
    """Opens what a recipe names.

    Args:
        spec: Entries of two kinds, one or several. `file` with `root` (folder of its images, its own if not given) and
            `repeat`; it may be an InternVL meta file. `dataset` with `split` ("train" if not given), `streaming`,
            `name`, `data_files`, `data_dir` and `revision` as `datasets.load_dataset` takes them, `root` (the folder
            of local `data_files`, else where the command runs) and, if it does not stream, `repeat`. A repeat below 1
            is a share.
        processor: See `ConversationEncoder`.
        max_tokens: Longer conversations are bad rows.
        seed: Of a stream's order; rows by number have none.
        buffer_size: See `ConversationStream`.
        num_processes, process_index: Those of `torch.distributed` if not given.

    Raises:
        ValueError: if an entry is wrong, or a dataset cannot be opened.
        FileNotFoundError: if a file or folder is missing.
        ImportError: if the `datasets` library is needed and missing.
    """
    entries = [spec] if isinstance(spec, dict) else list(spec)
    if not entries:
        raise ValueError("The data names nothing to read; give at least one file or dataset.")
    for entry in entries:
        check_entry(entry)
    streaming = {bool(entry.get("streaming")) for entry in entries}
    if len(streaming) > 1:
        raise ValueError("The data mixes streaming datasets with others; make all of them stream, or none.")
    if streaming == {False}:
        sources = [source for entry in entries for source in _opened(entry)]
        return ConversationRows(ConversationEncoder(processor, max_tokens), sources)
    if num_processes is None or process_index is None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        num_processes = torch.distributed.get_world_size() if ready else 1
        process_index = torch.distributed.get_rank() if ready else 0
    encoder = ConversationEncoder(processor, max_tokens)
    streams = [(_load_dataset(entry), entry["dataset"], _root(entry)) for entry in entries]
    return ConversationStream(encoder, streams, seed, buffer_size, num_processes, process_index)


def check_entry(entry: Any) -> None:
    """Raises ValueError if an entry of `open_data` has unknown keys or values of the wrong type."""
    if not isinstance(entry, dict):
        raise ValueError(f"The data's entry {entry!r} must be keys and values, such as `file: train.jsonl`.")
    if ("file" in entry) == ("dataset" in entry):
        near = {key: difflib.get_close_matches(str(key), ("file", "dataset"), n=1) for key in entry}
        hint = next((f"; did you mean {found[0]} for {key}?" for key, found in near.items() if found), ".")
        raise ValueError(f"The data's entry {entry!r} needs one of file and dataset{hint if len(entry) else '.'}")
    known = FILE_KEYS if "file" in entry else DATASET_KEYS
    for key, value in entry.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}."
            raise ValueError(f"The data's entry {entry!r} has the unknown key {key!r}{hint}")
        wanted = {"repeat": (int, float), "streaming": bool, "data_files": (str, list, dict)}.get(key, str)
        if not isinstance(value, wanted):
            raise ValueError(f"{key}={value!r} in the data's entry {entry!r} is of the wrong type.")
    checked_repeat(entry.get("repeat", 1), f"The data's entry {entry!r}")
    if entry.get("streaming") and "repeat" in entry:
        raise ValueError(f"The data's entry {entry!r} streams, which has no end to repeat; leave out repeat.")


def _opened(entry: dict[str, Any]) -> list[tuple[RecordFile | RecordTable, float]]:
    repeat = entry.get("repeat", 1)
    if "file" in entry:
        root = entry.get("root")
        return open_files(resolve(entry["file"]), None if root is None else resolve(root), repeat)
    return [(RecordTable(_load_dataset(entry), entry["dataset"], _root(entry)), repeat)]


def local_files(entry: dict[str, Any]) -> list[str]:
    """Files of this machine that an entry with a `dataset` reads by one of the library's builders, such as "json"."""
    files = entry.get("data_files") or []
    files = list(files.values()) if isinstance(files, dict) else files
    files = [files] if isinstance(files, str) else files
    flat = [file for item in files for file in ([item] if isinstance(item, str) else item)]
    # Builders such as "parquet" read files that lie here; files of a repository are the library's to find.
    return [] if "/" in entry["dataset"] else [file for file in flat if "://" not in file]


def _root(entry: dict[str, Any]) -> Path:
    if "root" in entry:
        root = resolve(entry["root"])
        if not root.is_dir():
            raise FileNotFoundError(f"root={entry['root']} is no folder; give the one that image paths start at.")
        return root
    files = local_files(entry)
    return Path(files[0]).parent if files else Path(".")


def _load_dataset(entry: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError('Datasets need the datasets library; run `pip install "mmmamba[train]"`.') from None
    for file in local_files(entry):
        if not any(letter in file for letter in "*?[") and not Path(file).exists():
            raise FileNotFoundError(f"{file} of the data's entry {entry!r} does not exist; give the path of a file.")
    options = {key: entry[key] for key in ("name", "data_files", "data_dir", "revision") if key in entry}
    try:
        return datasets.load_dataset(
            entry["dataset"], split=entry.get("split", "train"), streaming=entry.get("streaming", False), **options
        )
    except Exception as error:  # its builders raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"The dataset {entry['dataset']} cannot be opened ({reason}).") from error
