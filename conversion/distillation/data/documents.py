"""Documents as training rows: text files, JSON Lines and columns of datasets, encoded once and cut into rows.

Token ids are cached on disk by the `datasets` library and read from there through memory maps, so a corpus may be
larger than memory, and all processes and DataLoader workers share it.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmmamba.chat_template_mmmamba import ChatTemplateMixin, as_text, check_text
from mmmamba.conversion.distillation.recipe import resolve_path

from .formats import BadRow
from .records import RecordFile


TEXT_SUFFIXES = (".txt", ".md", ".rst")
RECORD_SUFFIXES = (".jsonl", ".json")
DOCUMENTS_AT_ONCE = 64  # encoded together
FORMAT = 1  # of the cached tables; raise it when what is written into them changes
Text = tuple[str, str, str | None]  # a document's name, its text, and why it cannot be read, if it cannot


class DocumentRows:
    """Rows of documents by number: each document is cut into rows one after the other.

    Args:
        documents: Encoded documents, see `open_documents`.
        row_tokens: Tokens of a row; the last one of a document has the rest. A rest of one token is left out, since
            nothing in it is predicted.

    Raises:
        ValueError: if there is no row.
    """

    def __init__(self, documents: Any, row_tokens: int):
        self.row_tokens = row_tokens
        self._about = documents.select_columns(["name", "error"])
        self._ids = documents.with_format("numpy", columns=["input_ids"])
        lengths = documents.data.column("length").to_numpy()
        rows = np.where(lengths < 0, 1, -(-(lengths - 1) // row_tokens))  # an unreadable document is one bad row
        self._ends = np.cumsum(rows)
        if not len(self):
            raise ValueError("No document has two tokens; give documents with more text in them.")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        """What the document of row `index` is called in messages: `file`, `file:line` or `dataset[index]`."""
        return self._about[self._locate(index)[0]]["name"]

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Row number `index`.

        Returns:
            `input_ids` and `labels`, (length,) int64 each and equal: every token is an answer.

        Raises:
            BadRow: if the document cannot be read.
        """
        document, start = self._locate(index)
        ids = self._ids[document]["input_ids"][start : start + self.row_tokens]
        if not len(ids):
            raise BadRow(self._about[document]["error"])
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def _locate(self, index: int) -> tuple[int, int]:
        """The document of row `index`, and the first token of the row in it."""
        document = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[document - 1]) if document else 0
        return document, (index - first) * self.row_tokens


def open_document_files(pattern: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Encodes the documents of files, or takes them from the cache.

    Args:
        pattern: A file, or a pattern such as `texts/**/*.md`, of which other kinds of files are left out: text files
            (.txt, .md, .rst), a document each, and .jsonl (or .json) of records `{"text": ...}`.
        tokenizer: Encodes the texts.

    Returns:
        See `encode_documents`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is of another kind.
    """
    path = resolve_path(pattern)
    kinds = TEXT_SUFFIXES + RECORD_SUFFIXES
    if path.is_file() and path.suffix not in kinds:
        raise ValueError(f"documents={pattern} must end in {', '.join(kinds)}.")
    files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file() and file.suffix in kinds]
    if not files:
        raise FileNotFoundError(
            f"documents={pattern} names no file that ends in {', '.join(kinds)}; give one, or a pattern such as "
            "texts/**/*.md."
        )
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return encode_documents(_read_files(files), f"documents={pattern}", stats, tokenizer)


def open_document_column(dataset: Any, column: str, label: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Encodes the documents in a column of a dataset, or takes them from the cache.

    Args:
        dataset: A map-style dataset of the `datasets` library.
        column: Has a document per record.
        label: What the dataset is called in messages.
        tokenizer: Encodes the texts.

    Returns:
        See `encode_documents`.

    Raises:
        ValueError: if there is no such column.
    """
    if column not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise ValueError(f"The dataset {label} has no column text={column}; it has {known}.")
    texts = (
        _checked(f"{label}[{index}]", record[column]) for index, record in enumerate(dataset.select_columns([column]))
    )
    return encode_documents(texts, f"The dataset {label}", [dataset._fingerprint, column], tokenizer)


def encode_documents(
    texts: Iterator[Text], label: str, source: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Encodes documents, each with the tokenizer's beginning token if it adds one, and with its end token.

    Special tokens that a text happens to hold are encoded as plain text. Documents without text are left out.

    Args:
        texts: Name, text and, for a document that cannot be read, the reason. Not read if the cache has them.
        label: What they are called in messages.
        source: What the texts depend on, as JSON.
        tokenizer: Encodes them.

    Returns:
        A `datasets.Dataset` with a record per document: `name`; `input_ids`; `length`, their number, -1 for a document
        that cannot be read; `error`, why not.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('Documents need the datasets library; run `pip install "mmmamba[train]"`.') from None

    def records() -> Iterator[dict[str, Any]]:
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            readable = [text for _, text, error in batch if error is None and text.strip()]
            ids = iter(_encode(readable, tokenizer))
            for name, text, error in batch:
                if error is not None:
                    yield {"name": name, "input_ids": [], "length": -1, "error": error}
                elif text.strip():
                    encoded = next(ids)
                    yield {"name": name, "input_ids": encoded, "length": len(encoded), "error": None}

    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "input_ids": datasets.List(datasets.Value("int32")),
            "length": datasets.Value("int64"),
            "error": datasets.Value("string"),
        }
    )
    key = json.dumps([FORMAT, label, source, _tokenizer_state(tokenizer)]).encode()
    fingerprint = hashlib.sha256(key).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(records, features=features, fingerprint=fingerprint)
    except ValueError as error:  # the library's, about a dataset without records
        raise ValueError(f"{label} holds no text; give documents with text in them.") from error


def _read_files(files: Sequence[Path]) -> Iterator[Text]:
    for file in files:
        if file.suffix in TEXT_SUFFIXES:
            try:
                yield _checked(str(file), file.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError:
                yield str(file), "", "it is not UTF-8 text"
            continue
        records = RecordFile(file)
        for index in range(len(records)):
            try:
                record = records.read(index)
            except BadRow as error:
                yield records.name(index), "", str(error)
            else:
                yield _checked(records.name(index), record.get("text") if isinstance(record, dict) else None)


def _checked(name: str, text: Any) -> Text:
    if not isinstance(text, str):
        return name, "", f"its text is no string but {type(text).__name__}"
    try:
        return name, check_text(text, "it"), None
    except ValueError as error:
        return name, "", str(error)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if not texts:
        return
    if isinstance(tokenizer, ChatTemplateMixin):
        encoded = tokenizer([as_text(text, tokenizer) for text in texts], verbose=False)["input_ids"]
    else:
        encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    for ids in encoded:
        yield ids if end is None or ids[-1:] == [end] else [*ids, end]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What token ids depend on, as JSON."""
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str().encode()
    else:
        model = tokenizer.sp_model.serialized_model_proto()
    added, special = sorted(tokenizer.get_added_vocab().items()), [tokenizer.eos_token_id, tokenizer("")["input_ids"]]
    return [type(tokenizer).__name__, hashlib.sha256(model).hexdigest(), added, special]
