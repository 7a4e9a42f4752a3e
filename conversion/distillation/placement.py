"""Which layers should stay attention: those whose Mamba-2 replacement costs most, measured one layer at a time.

Recent work on linearised models finds that measured placement beats fixed intervals; see docs/results.md for how the
two compare here.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .losses import count_tokens, distillation_loss


@torch.no_grad()
def replacement_kl(
    teacher: MmMambaForConditionalGeneration,
    student: MmMambaForConditionalGeneration,
    batches: list[dict[str, Tensor]],
) -> list[float]:
    """What each layer's replacement costs: KL(teacher || teacher with the student's layer), nats per token.

    Args:
        teacher: All attention; the same afterwards.
        student: All Mamba-2, trained by stages 1 or 2; may be held in another dtype.
        batches: Held-out inputs. Only tokens of answers count if there are `labels`, each as much as any other.

    Returns:
        One value per layer.
    """
    device, layers = teacher.device, teacher.model.layers
    answers_only = all("labels" in batch for batch in batches)
    totals = torch.stack([count_tokens(batch) for batch in batches]).sum(0)

    def last_hidden_state(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        return teacher.model(**inputs, use_cache=False).last_hidden_state

    def kl(batch: dict[str, Tensor], expected: Tensor) -> float:
        batch, expected = {name: value.to(device) for name, value in batch.items()}, expected.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=teacher.dtype != student.dtype):
            hidden = last_hidden_state(batch).to(expected.dtype)
        head = teacher.lm_head
        return float(distillation_loss(hidden, expected, head, head, batch, totals, answers_only=answers_only))

    # Only one batch at a time is on the device.
    expected = [last_hidden_state(batch).cpu() for batch in batches]
    costs = []
    for index in tqdm(range(len(layers)), desc="measuring layers", leave=False):
        original = layers[index]
        layers[index] = student.model.layers[index]
        try:
            costs.append(sum(kl(*pair) for pair in zip(batches, expected, strict=True)))
        finally:
            layers[index] = original
    return costs


def costliest_layers(costs: list[float], count: int) -> list[int]:
    """The `count` layers that cost most, in order."""
    return sorted(sorted(range(len(costs)), key=lambda index: -costs[index])[:count])
