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
    costs, device = [], teacher.device.type
    answers_only = all("labels" in batch for batch in batches)
    totals = torch.stack([totals_of(batch) for batch in batches]).sum(0)
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    truths = [teacher.model(**one, use_cache=False).last_hidden_state for one in inputs]
    layers = teacher.model.layers
    for index in tqdm(range(len(layers)), desc="measuring layers", leave=False):
        original = layers[index]
        replacement = student.model.layers[index]
        layers[index] = replacement
        try:
            with torch.autocast(device, torch.bfloat16, enabled=teacher.dtype != student.dtype):
                rows = [teacher.model(**one, use_cache=False).last_hidden_state for one in inputs]
            losses = [
                distillation_loss(
                    row.to(truth.dtype),
                    truth,
                    teacher.lm_head,
                    teacher.lm_head,
                    batch,
                    totals,
                    answers_only=answers_only,
                )
                for row, truth, batch in zip(rows, truths, batches, strict=True)
            ]
        finally:
            layers[index] = original
        costs.append(float(torch.stack(losses).sum()))
    return costs


def costliest(costs: list[float], count: int) -> list[int]:
    """The `count` layers that cost most, in order."""
    return sorted(sorted(range(len(costs)), key=lambda index: -costs[index])[:count])
