"""Records of conversations, read one at a time: of files, of those that an InternVL meta file lists, of tables."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .formats import BadRow, error_reason


META_KEYS = {"annotation", "root", "repeat_time", "max_dynamic_patch", "data_augment", "length"}
_SPACE_OR_COMMA = re.compile(r"[ \t\r\n,]*")
_SCAN_BYTES = 1 << 24  # bytes of a file that are searched for line ends at once


class RecordFile:
    """The records of a file. Only their positions are kept in memory.

    Args:
        file: JSON Lines (`.jsonl`), or `.json` with a list or lines.
        root: Folder of the images; the file's own if not given.
        max_patches: Largest number of tiles of a record, see `ConversationEncoder`.
        any_path: Whether images may be anywhere, see `ConversationEncoder`.

    Raises:
        FileNotFoundError: if file or root is missing.
        ValueError: if the file holds no records, or is a list that is broken JSON.
    """

    def __init__(
        self,
        file: str | Path,
        root: str | Path | None = None,
        max_patches: int | None = None,
        any_path: bool = False,
    ):
        self.file, self.max_patches, self.any_path = Path(file), max_patches, any_path
        self.root = self.file.parent if root is None else Path(root)
        if not self.file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give the path of a .jsonl or .json file.")
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={root} is no folder; give the one that image paths of {file} start at.")
        if self.file.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{file} must end in .jsonl or .json.")
        self.line_numbers = None  # of each record; None if they are a list
        if self.file.suffix == ".json" and _first_byte(self.file) == b"[":
            self.starts, self.ends = _find_list_items(self.file)
        else:
            self.starts, self.ends, self.line_numbers = _find_lines(self.file)
        if not len(self.starts):
            raise ValueError(f"{file} has no records.")
        self._handle: tuple[int, Any] = (0, None)  # process id, open file

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        """What a record is called in messages: `file:line`, or `file[index]` in a list."""
        return f"{self.file}[{index}]" if self.line_numbers is None else f"{self.file}:{self.line_numbers[index]}"

    def read(self, index: int) -> dict[str, Any]:
        """Record number `index`. Raises BadRow if it is broken JSON."""
        if self._handle[0] != os.getpid():  # a forked process shares the file position of the handle
            self._handle = os.getpid(), self.file.open("rb")
        self._handle[1].seek(self.starts[index])
        try:
            return json.loads(self._handle[1].read(int(self.ends[index] - self.starts[index])))
        except json.JSONDecodeError as error:
            raise BadRow(f"it is broken JSON ({error.msg} at character {error.pos})") from None
        except UnicodeDecodeError:
            raise BadRow("it is broken JSON (not UTF-8)") from None
        except RecursionError:
            raise BadRow("it is broken JSON (nested too deeply)") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": (0, None)}


class RecordTable:
    """The records of a map-style dataset of the `datasets` library.

    Args:
        dataset: A `datasets.Dataset`.
        label: What it is called in messages.
        root: Folder that image paths start at.
        any_path: Whether images may be anywhere, see `ConversationEncoder`.
    """

    max_patches = None

    def __init__(self, dataset: Any, label: str, root: str | Path = ".", any_path: bool = False):
        self.dataset, self.label, self.root, self.any_path = dataset, label, Path(root), any_path
        if not len(dataset):
            raise ValueError(f"{label} has no records.")

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """What a record is called in messages: `dataset[index]`."""
        return f"{self.label}[{index}]"

    def read(self, index: int) -> dict[str, Any]:
        """Record number `index`. Raises BadRow if it cannot be read, its images included."""
        try:
            return self.dataset[index]
        except Exception as error:  # image columns are decoded here; on damaged files Pillow raises nearly anything
            raise BadRow(f"it cannot be read ({error_reason(error)})") from None


def open_files(
    file: str | Path, root: str | Path | None = None, repeat: float = 1, any_path: bool = False
) -> list[tuple[RecordFile, float]]:
    """Opens a file of records, or every file that an InternVL meta file lists.

    Paths in a meta file start at its own folder or, if there is nothing of that name, at the working directory. Of a
    meta file's keys `max_dynamic_patch` is the largest number of tiles of a record, which its images share, as they do
    upstream; `data_augment` and `length` are ignored: images are never augmented, and records are counted.

    Args:
        file: `.jsonl` or `.json`.
        root: Folder of the images; not with a meta file, which names its own.
        repeat: How often each record is read, or the share of records if below 1; not with a meta file.
        any_path: Whether images may be anywhere, see `ConversationEncoder`.

    Returns:
        Each file's records and its `repeat`.

    Raises:
        FileNotFoundError: if a file or root is missing.
        ValueError: if a file is neither records nor meta, or a meta entry has unknown or wrong keys.
    """
    file = Path(file)
    if file.suffix != ".json" or not file.is_file() or (meta := _read_meta(file)) is None:
        return [(RecordFile(file, root, any_path=any_path), repeat)]
    if root is not None or repeat != 1:
        raise ValueError(f"{file} is a meta file; say root and repeat_time in it, not root and repeat beside it.")
    return [_open_meta_entry(file, name, entry, any_path) for name, entry in meta.items()]


def check_repeat(repeat: Any, where: str) -> float:
    """`repeat` if it is a whole number of times or a share below 1. Raises ValueError if not."""
    is_number = isinstance(repeat, (int, float)) and not isinstance(repeat, bool)
    if not is_number or repeat <= 0 or (repeat > 1 and repeat != int(repeat)):
        raise ValueError(f"{where} repeats {repeat!r} times; give a whole number, or a share between 0 and 1.")
    return repeat


def _read_meta(file: Path) -> dict[str, Any] | None:
    """The content of a meta file; None for a file of records."""
    if _first_byte(file) != b"{":
        return None
    try:
        meta = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines with the suffix .json
            return None
        raise ValueError(f"{file}:{error.lineno} is broken JSON ({error.msg}); repair the file.") from None
    if "conversations" in meta or "messages" in meta:
        return None
    return meta


def _open_meta_entry(file: Path, name: str, entry: Any, any_path: bool) -> tuple[RecordFile, float]:
    where = f"{file}: {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with annotation and root, not {entry!r}.")
    if unknown := sorted(entry.keys() - META_KEYS):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(META_KEYS))}.")
    if not isinstance(entry.get("annotation"), str):
        raise ValueError(f"{where} has no annotation; give the path of its .jsonl file.")

    def resolve(path: str) -> Path:
        beside = file.parent / path
        if not beside.exists() and not Path(path).exists():
            raise FileNotFoundError(f"{where} names {path}, which is neither in {file.parent} nor in {Path.cwd()}.")
        return beside if beside.exists() else Path(path)

    root = None if entry.get("root") is None else resolve(entry["root"])
    max_patches = entry.get("max_dynamic_patch")
    if max_patches is not None and (type(max_patches) is not int or max_patches < 1):
        raise ValueError(f"{where} has max_dynamic_patch={max_patches!r}; give a whole number of tiles, at least 1.")
    repeat = check_repeat(entry.get("repeat_time", 1), where)
    return RecordFile(resolve(entry["annotation"]), root, max_patches, any_path), repeat


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _find_lines(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end offsets of the non-empty lines, and their numbers from 1; (records,) int64 each."""
    size = file.stat().st_size
    if not size:
        return (np.zeros(0, dtype=np.int64),) * 3
    content = np.memmap(file, dtype=np.uint8, mode="r")
    breaks = [
        np.flatnonzero(content[offset : offset + _SCAN_BYTES] == ord("\n")) + offset
        for offset in range(0, size, _SCAN_BYTES)
    ]
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    filled = ends > starts
    filled[filled] = (ends - starts > 1)[filled] | (content[starts[filled]] != ord("\r"))
    indices = np.flatnonzero(filled)
    return starts[indices], ends[indices], indices + 1


def _find_list_items(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Start and end offsets of the items of a JSON list; (records,) int64 each."""
    # In Latin-1 every byte is one character, so offsets in the text are offsets in the file, and the characters that
    # structure JSON are ASCII.
    text = file.read_bytes().decode("latin-1")
    decode, starts, ends = json.JSONDecoder().raw_decode, [], []
    offset = _SPACE_OR_COMMA.match(text, text.index("[") + 1).end()
    try:
        while text[offset : offset + 1] != "]":
            starts.append(offset)
            _, offset = decode(text, offset)
            ends.append(offset)
            offset = _SPACE_OR_COMMA.match(text, offset).end()
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno} is broken JSON ({error.msg}); repair the file.") from None
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
