"""Which layers should stay attention: those whose Mamba-2 replacement costs most, measured one layer at a time.

Recent work on linearised models finds that measured placement beats fixed intervals; see docs/results.md for how the
two compare here.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .counting import totals_of
from .end_to_end import distillation_loss


@torch.no_grad()
def layer_costs(
    teacher: MmMambaForConditionalGeneration,
    student: MmMambaForConditionalGeneration,
    batches: list[dict[str, Tensor]],
) -> list[float]:
    """What each layer's replacement costs: KL(teacher || teacher with that layer's mixer) per token.

    Args:
        teacher: All attention; the same afterwards.
        student: All Mamba-2, trained by stages 1 or 2; may be held in another dtype.
        batches: Held-out inputs; answers' tokens count if there are `labels`, else all, each as much as any other.

    Returns:
        One value per layer.
    """
    device, layers = teacher.device, teacher.model.layers
    answers_only = all("labels" in batch for batch in batches)
    totals = torch.stack([totals_of(batch) for batch in batches]).sum(0)

    def rows_of(batch: dict[str, Tensor]) -> Tensor:
        return teacher.model(
            **{key: x for key, x in batch.items() if key != "labels"}, use_cache=False
        ).last_hidden_state

    def loss_of(batch: dict[str, Tensor], truth: Tensor) -> float:
        batch, truth = {name: value.to(device) for name, value in batch.items()}, truth.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=teacher.dtype != student.dtype):
            rows = rows_of(batch).to(truth.dtype)
        heads = teacher.lm_head, teacher.lm_head
        return float(distillation_loss(rows, truth, *heads, batch, totals, answers_only=answers_only))

    # Only one batch at a time is on the device.
    truths = [rows_of({name: value.to(device) for name, value in batch.items()}).cpu() for batch in batches]
    costs = []
    for index in tqdm(range(len(layers)), desc="measuring layers", leave=False):
        original = layers[index]
        layers[index] = student.model.layers[index]
        try:
            costs.append(sum(loss_of(*one) for one in zip(batches, truths, strict=True)))
        finally:
            layers[index] = original
    return costs


def costliest(costs: list[float], count: int) -> list[int]:
    """The `count` layers that cost most, in order."""
    return sorted(sorted(range(len(costs)), key=lambda index: -costs[index])[:count])
