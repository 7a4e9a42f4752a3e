"""The entries of a recipe's `data:` list: files and datasets of conversations, and documents."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mmmamba.conversion.distillation.recipe import resolve_path
from mmmamba.processing_mmmamba import MmMambaProcessor

from .dataset import ConversationDataset
from .documents import DocumentRows, open_document_column, open_document_files
from .encoding import ConversationEncoder
from .records import RecordFile, RecordTable, check_repeat, open_files
from .stream import ConversationStream


FILE_KEYS = ("file", "root", "image_paths", "repeat")
DATASET_KEYS = (
    "dataset",
    "name",
    "split",
    "streaming",
    "data_files",
    "data_dir",
    "revision",
    "root",
    "image_paths",
    "text",
    "repeat",
)
DOCUMENT_KEYS = ("documents", "repeat")


def open_data(
    data: Sequence[dict[str, Any]] | dict[str, Any],
    processor: MmMambaProcessor | PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    row_tokens: int = 512,
    seed: int = 0,
    buffer_size: int = 1000,
    num_processes: int | None = None,
    process_index: int | None = None,
) -> ConversationDataset | ConversationStream:
    """Opens what a recipe names.

    Args:
        data: Entries of three kinds, one or several. `file` with `root` (folder of its images, its own if not given)
            and `repeat`; it may be an InternVL meta file. `dataset` with `split` ("train" if not given), `streaming`,
            `name`, `data_files`, `data_dir` and `revision` as `datasets.load_dataset` takes them, `root` (the folder
            of local `data_files`, else the working directory) and, if it does not stream, `repeat`. A repeat below 1
            is a share. With `image_paths: any` in an entry of either kind, images may be outside of `root` and at
            URLs; otherwise such records are bad rows. `documents` with `repeat`: a file or a pattern, see
            `open_document_files`. A `dataset` with `text` holds documents, too, in that column.
        processor: See `ConversationEncoder`; a tokenizer alone encodes text only.
        max_tokens: Longer conversations are bad rows.
        row_tokens: Documents are cut into rows of as many tokens.
        seed: Of a stream's order; rows by number have none.
        buffer_size: See `ConversationStream`.
        num_processes, process_index: Those of `torch.distributed` if not given.

    Raises:
        ValueError: if an entry is wrong, or a dataset cannot be opened.
        FileNotFoundError: if a file or folder is missing.
        ImportError: if the `datasets` library is needed and missing.
    """
    entries = [data] if isinstance(data, dict) else list(data)
    if not entries:
        raise ValueError("The data names nothing to read; give at least one file or dataset.")
    for entry in entries:
        check_entry(entry)
    streaming = {bool(entry.get("streaming")) for entry in entries}
    if len(streaming) > 1:
        raise ValueError("The data mixes streaming datasets with others; make all of them stream, or none.")
    if streaming == {False}:
        tokenizer = getattr(processor, "tokenizer", processor)
        sources = [source for entry in entries for source in _open_entry(entry, tokenizer, row_tokens)]
        only_documents = all(_holds_documents(entry) for entry in entries)
        return ConversationDataset(None if only_documents else ConversationEncoder(processor, max_tokens), sources)
    if num_processes is None or process_index is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        num_processes = torch.distributed.get_world_size() if distributed else 1
        process_index = torch.distributed.get_rank() if distributed else 0
    encoder = ConversationEncoder(processor, max_tokens)
    streams = [(_load_dataset(entry), entry["dataset"], _root(entry), _any_path(entry)) for entry in entries]
    return ConversationStream(encoder, streams, seed, buffer_size, num_processes, process_index)


def check_entry(entry: Any) -> None:
    """Raises ValueError if an entry of `open_data` has unknown keys or values of the wrong type."""
    if not isinstance(entry, dict):
        raise ValueError(f"The data's entry {entry!r} must be keys and values, such as `file: train.jsonl`.")
    kinds = {"file": FILE_KEYS, "dataset": DATASET_KEYS, "documents": DOCUMENT_KEYS}
    if sum(kind in entry for kind in kinds) != 1:
        close = {key: difflib.get_close_matches(str(key), kinds, n=1) for key in entry}
        hint = next((f"; did you mean {found[0]} for {key}?" for key, found in close.items() if found), ".")
        raise ValueError(f"The data's entry {entry!r} needs one of file and dataset, or documents{hint}")
    (known,) = (keys for kind, keys in kinds.items() if kind in entry)
    for key, value in entry.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}."
            raise ValueError(f"The data's entry {entry!r} has the unknown key {key!r}{hint}")
        expected_type = {"repeat": (int, float), "streaming": bool, "data_files": (str, list, dict)}.get(key, str)
        if not isinstance(value, expected_type):
            raise ValueError(f"{key}={value!r} in the data's entry {entry!r} is of the wrong type.")
    if entry.get("image_paths", "root") not in ("root", "any"):
        raise ValueError(
            f"image_paths={entry['image_paths']!r} in the data's entry {entry!r} is unknown; give root (the default) "
            "or any, which lets records name images outside of root and at URLs."
        )
    check_repeat(entry.get("repeat", 1), f"The data's entry {entry!r}")
    if entry.get("streaming") and "text" in entry:
        raise ValueError(f"The data's entry {entry!r} holds documents, which are read by number; leave out streaming.")
    if entry.get("streaming") and "repeat" in entry:
        raise ValueError(f"The data's entry {entry!r} streams, which has no end to repeat; leave out repeat.")


def _holds_documents(entry: dict[str, Any]) -> bool:
    return "documents" in entry or "text" in entry


def _open_entry(
    entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase, row_tokens: int
) -> list[tuple[RecordFile | RecordTable | DocumentRows, float]]:
    repeat = entry.get("repeat", 1)
    if "documents" in entry:
        return [(DocumentRows(open_document_files(entry["documents"], tokenizer), row_tokens), repeat)]
    if "text" in entry:
        documents = open_document_column(_load_dataset(entry), entry["text"], entry["dataset"], tokenizer)
        return [(DocumentRows(documents, row_tokens), repeat)]
    if "file" in entry:
        root = entry.get("root")
        root = None if root is None else resolve_path(root)
        return open_files(resolve_path(entry["file"]), root, repeat, _any_path(entry))
    return [(RecordTable(_load_dataset(entry), entry["dataset"], _root(entry), _any_path(entry)), repeat)]


def _any_path(entry: dict[str, Any]) -> bool:
    return entry.get("image_paths") == "any"


def local_files(entry: dict[str, Any]) -> list[str]:
    """Local files that an entry with a `dataset` reads by one of the library's builders, such as "json"."""
    files = entry.get("data_files") or []
    files = list(files.values()) if isinstance(files, dict) else files
    files = [files] if isinstance(files, str) else files
    files = [file for item in files for file in ([item] if isinstance(item, str) else item)]
    # Builders such as "parquet" read local files; files of a repository are the library's to find.
    return [] if "/" in entry["dataset"] else [file for file in files if "://" not in file]


def _root(entry: dict[str, Any]) -> Path:
    if "root" in entry:
        root = resolve_path(entry["root"])
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
        if not any(wildcard in file for wildcard in "*?[") and not Path(file).exists():
            raise FileNotFoundError(f"{file} of the data's entry {entry!r} does not exist; give the path of a file.")
    options = {key: entry[key] for key in ("name", "data_files", "data_dir", "revision") if key in entry}
    try:
        return datasets.load_dataset(
            entry["dataset"], split=entry.get("split", "train"), streaming=entry.get("streaming", False), **options
        )
    except Exception as error:  # dataset builders raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"The dataset {entry['dataset']} cannot be opened ({reason}).") from error
