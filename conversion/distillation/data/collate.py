"""Rows to a batch, padded or packed. Rows are what `ConversationEncoder` and `DocumentRows` return."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Rows to one batch, padded on the right.

    Args:
        rows: See `ConversationEncoder`.
        pad_token_id: Fills `input_ids`.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, length) int64; `pixel_values` (tiles, 3, size, size) as in the
        rows, of all of them in order, if there are any; `bad_rows`, a list of (name, reason), if there are any;
        `num_rows` before a `LengthCurriculum` cut them, if it did.
    """
    rows, added = _without_groups(rows)
    length = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
    }
    for i, row in enumerate(rows):
        row_length = len(row["input_ids"])
        batch["input_ids"][i, :row_length] = row["input_ids"]
        batch["labels"][i, :row_length] = row["labels"]
        batch["attention_mask"][i, :row_length] = 1
    return batch | added | _images_and_bad_rows(rows)


def pack(rows: Sequence[dict[str, Any]], pad_token_id: int | None = None) -> dict[str, Any]:
    """Rows to one sequence without padding; `position_ids` start from 0 again in each row.

    Args:
        rows: See `ConversationEncoder`.
        pad_token_id: Not used; there so that `pad` and `pack` are called alike.

    Returns:
        `input_ids`, `position_ids`, and `labels`, -100 where a row starts, (1, total length) int64; `pixel_values`,
        `bad_rows` and `num_rows` as of `pad`.
    """
    rows, added = _without_groups(rows)
    labels = [row["labels"].clone() for row in rows]
    for row_labels in labels:
        row_labels[0] = -100  # the token before it is another row's
    packed: dict[str, Tensor] = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": torch.cat(labels)[None],
    }
    return packed | added | _images_and_bad_rows(rows)


def _without_groups(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[dict[str, Any]], dict[str, Any]]:
    """Rows, those that a `LengthCurriculum` cut one by one, and `num_rows`, how many there were before if it did."""
    if not any("rows" in row for row in rows):
        return rows, {}
    apart = []
    for row in rows:
        first, *others = row.get("rows", [row])
        apart += [first | {key: row[key] for key in ("bad_rows",) if key in row}, *others]
    return apart, {"num_rows": len(rows)}


def _images_and_bad_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tiles = [row["pixel_values"] for row in rows if len(row.get("pixel_values", ()))]
    bad = [one for row in rows for one in row.get("bad_rows", [])]
    return ({"pixel_values": torch.cat(tiles)} if tiles else {}) | ({"bad_rows": bad} if bad else {})
