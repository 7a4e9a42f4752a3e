"""What a loss is a mean over: the positions of a batch, and the answers' tokens among them.

The counts of all micro-batches and processes of a step are summed before anything is divided by them, so that a step
is the same however its conversations are dealt out.
"""

import torch
from torch import Tensor


def counted(batch: dict[str, Tensor]) -> Tensor:
    """(batch, length), true where a position is no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def following(labels: Tensor) -> Tensor:
    """(batch, length), the label that each position predicts: the next position's, -100 at the end."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def totals_of(batch: dict[str, Tensor], include_padding: bool = False) -> Tensor:
    """(2,), int64: how many positions count in a batch, and how many predict an answer's token."""
    mask = counted(batch)
    labels = batch.get("labels")
    positions = mask.numel() if include_padding else int(mask.sum())
    answers = 0 if labels is None else int((following(labels) != -100).sum())
    return torch.tensor([positions, answers])
