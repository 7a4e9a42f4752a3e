"""Records of conversations as users have them: which formats there are, and reading one record of a file at a time.

Three formats, told apart record by record:

- LLaVA and InternVL: `{"image": "a.jpg" or [], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}`
- VLM-SFT (TRL): `{"messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...], "images": [...]}`
- the same with plain text: `{"messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...], "images": [...]}`

`<image>` in a text stands for a picture, unless some content of the record is a list of parts: there, it is text.
Pictures without a place go in front of the first question, as in `chat()`. A picture is a path, a PIL image, bytes, or
`{"bytes": ..., "path": ...}`.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from mmmamba.processing_mmmamba import PLACEHOLDER


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
META_KEYS = {"annotation", "root", "repeat_time", "max_dynamic_patch", "data_augment", "length"}
_SPACE_OR_COMMA = re.compile(r"[ \t\r\n,]*")
_CHUNK = 1 << 24  # bytes of a file that are searched for line ends at once


class BadRow(ValueError):
    """A record that cannot become a training row; says why in one sentence."""


def reason_of(error: Exception) -> str:
    """Why a picture could not be read, the same on every run."""
    if isinstance(error, UnidentifiedImageError):  # its text holds an address in memory
        return "it is no picture that Pillow knows"
    return str(error).split("\n")[0] or type(error).__name__


@dataclass
class Conversation:
    """A record in the form that chat templates take.

    Args:
        messages: `role` and `content` each; content is text, or parts `{"type": "image"}` and `{"type": "text", ...}`.
        images: In the order of their places.
        literal: Whether `<image>` in texts is text and only parts are places.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    literal: bool


def conversation_of(record: dict[str, Any]) -> Conversation:
    """A record of any known format as messages and images.

    Raises:
        BadRow: if it is none, or its turns, answers, places and images do not fit together.
    """
    if not isinstance(record, dict):
        raise BadRow(f"the record is no object with keys but {type(record).__name__}")
    if record.get("video") or record.get("videos"):
        raise BadRow("the record has a video, which the model cannot read")
    turns = record.get("conversations")
    turns = record.get("messages") if turns is None else turns
    if turns is None:
        raise BadRow(
            f"the record has neither conversations nor messages but {', '.join(map(str, record)) or 'nothing'}"
        )
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRow("the conversation is empty")
    images, of_parts, messages = _images_of(record), [], []
    for number, turn in enumerate(turns, start=1):
        messages.append(_message(turn, number, of_parts))
    _check_turns(messages)
    if any(isinstance(message["content"], list) for message in messages):
        return Conversation(messages, _fill_parts(messages, of_parts, images), literal=True)
    places = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if images and not places:
        question = _first_question(messages)
        question["content"] = PLACEHOLDER * len(images) + "\n" + question["content"]
    elif places != len(images):
        raise BadRow(f"the record has {places} {PLACEHOLDER} placeholders but {len(images)} images")
    if any(PLACEHOLDER in message["content"] for message in messages if message["role"] == "assistant"):
        raise BadRow("an answer holds an image; images belong into questions")
    return Conversation(messages, images, literal=False)


def _images_of(record: dict[str, Any]) -> list[Any]:
    found = [record[key] for key in ("image", "images") if record.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise BadRow("the record has both image and images")
    return [image for value in found for image in (value if isinstance(value, (list, tuple)) else [value])]


def _message(turn: Any, number: int, of_parts: list[Any]) -> dict[str, Any]:
    """One turn; the images of its parts, None where a part takes one of the record's, go to `of_parts`."""
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is no object with keys but {type(turn).__name__}")
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"message {number} has the unknown role {role!r}")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = [_part(part, number, of_parts) for part in content]
        if ROLES[role] == "assistant" and any(part["type"] == "image" for part in content):
            raise BadRow("an answer holds an image; images belong into questions")
    elif not isinstance(content, str):
        raise BadRow(f"message {number} has no text")
    return {"role": ROLES[role], "content": content}


def _part(part: Any, number: int, of_parts: list[Any]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise BadRow(f"message {number} has a part that is neither text nor image but {kind!r}")
    # Tables fill the keys that a part does not have with None.
    sources = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    if part.get("bytes") is not None:
        sources = [{"bytes": part["bytes"], "path": part.get("path")}]
    if sources and isinstance(sources[0], dict) and all(value is None for value in sources[0].values()):
        sources = []
    of_parts.append(sources[0] if sources else None)
    return {"type": "image"}


def _check_turns(messages: list[dict[str, Any]]) -> None:
    previous, answers = None, 0
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if role == "system":
            if number > 1:
                raise BadRow(f"message {number} is a system message but not the first one")
            continue
        if previous is None and role == "assistant":
            raise BadRow("the conversation begins with an answer")
        if role == previous:
            kind = "answers" if role == "assistant" else "questions"
            raise BadRow(f"messages {number - 1} and {number} are two {kind} in a row")
        previous = role
        answers += role == "assistant"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not any(part["type"] == "image" or part["text"].strip() for part in parts):
            raise BadRow(f"message {number}, {'an answer' if role == 'assistant' else 'a question'}, is empty")
    if not answers:
        raise BadRow("the conversation has no answer")


def _first_question(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return next(message for message in messages if message["role"] == "user")


def _fill_parts(messages: list[dict[str, Any]], of_parts: list[Any], images: list[Any]) -> list[Any]:
    """The images of all parts in order; images without any part get parts in front of the first question."""
    if images and not of_parts:
        question = _first_question(messages)
        asked = question["content"]
        asked = [{"type": "text", "text": asked}] if isinstance(asked, str) else asked
        question["content"] = [{"type": "image"} for _ in images] + asked
        return images
    missing = sum(image is None for image in of_parts)
    if missing != len(images):
        raise BadRow(f"the record has {missing} image parts without a picture of their own but {len(images)} images")
    rest = iter(images)
    return [next(rest) if image is None else image for image in of_parts]


class RecordFile:
    """The records of a file, read one at a time: only where they stand is kept in memory.

    Args:
        file: JSON Lines (`.jsonl`), or `.json` with a list or lines.
        root: Folder of the images; the file's own if not given.
        max_patches: Most tiles of a record's pictures, see `ConversationEncoder`.

    Raises:
        FileNotFoundError: if file or root is missing.
        ValueError: if the file holds no records, or is a list that is broken JSON.
    """

    def __init__(self, file: str | Path, root: str | Path | None = None, max_patches: int | None = None):
        self.file, self.max_patches = Path(file), max_patches
        self.root = self.file.parent if root is None else Path(root)
        if not self.file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give the path of a .jsonl or .json file.")
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={root} is no folder; give the one that image paths of {file} start at.")
        if self.file.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{file} must end in .jsonl or .json.")
        self.lines = None  # the line of each record; None if they are a list
        if self.file.suffix == ".json" and _first_byte(self.file) == b"[":
            self.starts, self.ends = _list_items(self.file)
        else:
            self.starts, self.ends, self.lines = _lines(self.file)
        if not len(self.starts):
            raise ValueError(f"{file} has no records.")
        self._opened: tuple[int, Any] = (0, None)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        """What a record is called: `file:line`, or `file[index]` in a list."""
        return f"{self.file}[{index}]" if self.lines is None else f"{self.file}:{self.lines[index]}"

    def read(self, index: int) -> dict[str, Any]:
        """Record number `index`. Raises BadRow if it is broken JSON."""
        if self._opened[0] != os.getpid():  # processes that share a handle would move each other's place
            self._opened = os.getpid(), self.file.open("rb")
        self._opened[1].seek(self.starts[index])
        try:
            return json.loads(self._opened[1].read(int(self.ends[index] - self.starts[index])))
        except json.JSONDecodeError as error:
            raise BadRow(f"it is broken JSON ({error.msg} at character {error.pos})") from None
        except UnicodeDecodeError:
            raise BadRow("it is broken JSON (not UTF-8)") from None
        except RecursionError:
            raise BadRow("it is broken JSON (nested too deeply)") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": (0, None)}


class RecordTable:
    """The records of a map-style dataset of the `datasets` library.

    Args:
        dataset: A `datasets.Dataset`.
        label: What it is called in messages.
        root: Folder that image paths start at.
    """

    max_patches = None

    def __init__(self, dataset: Any, label: str, root: str | Path = "."):
        self.dataset, self.label, self.root = dataset, label, Path(root)
        if not len(dataset):
            raise ValueError(f"{label} has no records.")

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """What a record is called: `dataset[index]`."""
        return f"{self.label}[{index}]"

    def read(self, index: int) -> dict[str, Any]:
        """Record number `index`. Raises BadRow if it cannot be read, its images included."""
        try:
            return self.dataset[index]
        except (
            Exception
        ) as error:  # image columns are decoded here, and Pillow raises nearly anything on damaged files
            raise BadRow(f"it cannot be read ({reason_of(error)})") from None


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _lines(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines that are not empty start and end, and their numbers; (records,) int64 each."""
    size = file.stat().st_size
    if not size:
        return (np.zeros(0, dtype=np.int64),) * 3
    content = np.memmap(file, dtype=np.uint8, mode="r")
    breaks = [np.flatnonzero(content[at : at + _CHUNK] == ord("\n")) + at for at in range(0, size, _CHUNK)]
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    filled = ends > starts
    filled[filled] = (ends - starts > 1)[filled] | (content[starts[filled]] != ord("\r"))
    numbers = np.flatnonzero(filled)
    return starts[numbers], ends[numbers], numbers + 1


def _list_items(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the items of a JSON list start and end; (records,) int64 each."""
    # Every byte is one character of Latin-1, so places in the text are places in the file; what JSON is made of is
    # ASCII and reads the same.
    text = file.read_bytes().decode("latin-1")
    decode, starts, ends = json.JSONDecoder().raw_decode, [], []
    place = _SPACE_OR_COMMA.match(text, text.index("[") + 1).end()
    try:
        while text[place : place + 1] != "]":
            starts.append(place)
            _, place = decode(text, place)
            ends.append(place)
            place = _SPACE_OR_COMMA.match(text, place).end()
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno} is broken JSON ({error.msg}); repair the file.") from None
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)


def open_files(file: str | Path, root: str | Path | None = None, repeat: float = 1) -> list[tuple[RecordFile, float]]:
    """Opens a file of records, or every file that an InternVL meta file lists.

    Paths in a meta file start at its own folder or, if there is nothing of that name, where the command runs. Of a
    meta file's keys `max_dynamic_patch` is the most tiles of a record, which its pictures share, as they do there;
    `data_augment` and `length` are ignored: pictures are never augmented, and records are counted.

    Args:
        file: `.jsonl` or `.json`.
        root: Folder of the images; not with a meta file, which names its own.
        repeat: How often each record is read, or a share below 1 of them; not with a meta file.

    Returns:
        Each file's records, and how often they are read.

    Raises:
        FileNotFoundError: if a file or root is missing.
        ValueError: if a file is neither records nor meta, or a meta entry has unknown or wrong keys.
    """
    file = Path(file)
    if file.suffix != ".json" or not file.is_file() or (meta := _meta(file)) is None:
        return [(RecordFile(file, root), repeat)]
    if root is not None or repeat != 1:
        raise ValueError(f"{file} is a meta file; say root and repeat_time in it, not root and repeat beside it.")
    return [_meta_entry(file, name, entry) for name, entry in meta.items()]


def _meta(file: Path) -> dict[str, Any] | None:
    """What a meta file holds; None for a file of records."""
    if _first_byte(file) != b"{":
        return None
    try:
        meta = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under another name
            return None
        raise ValueError(f"{file}:{error.lineno} is broken JSON ({error.msg}); repair the file.") from None
    if "conversations" in meta or "messages" in meta:
        return None
    return meta


def _meta_entry(file: Path, name: str, entry: Any) -> tuple[RecordFile, float]:
    where = f"{file}: {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with annotation and root, not {entry!r}.")
    if unknown := sorted(entry.keys() - META_KEYS):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(META_KEYS))}.")
    if not isinstance(entry.get("annotation"), str):
        raise ValueError(f"{where} has no annotation; give the path of its .jsonl file.")

    def found(path: str) -> Path:
        beside = file.parent / path
        if not beside.exists() and not Path(path).exists():
            raise FileNotFoundError(f"{where} names {path}, which is neither in {file.parent} nor in {Path.cwd()}.")
        return beside if beside.exists() else Path(path)

    root = None if entry.get("root") is None else found(entry["root"])
    most = entry.get("max_dynamic_patch")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"{where} has max_dynamic_patch={most!r}; give a whole number of tiles, at least 1.")
    return RecordFile(found(entry["annotation"]), root, most), checked_repeat(entry.get("repeat_time", 1), where)


def checked_repeat(repeat: Any, where: str) -> float:
    """`repeat` if it is a whole number of times or a share below 1. Raises ValueError if not."""
    number = isinstance(repeat, (int, float)) and not isinstance(repeat, bool)
    if not number or repeat <= 0 or (repeat > 1 and repeat != int(repeat)):
        raise ValueError(f"{where} repeats {repeat!r} times; give a whole number, or a share between 0 and 1.")
    return repeat
