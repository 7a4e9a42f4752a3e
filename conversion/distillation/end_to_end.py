"""Stage 3: the student's next-token distribution learns the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_sum(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at a temperature, summed over rows and vocabulary and times temperature squared.

    Args:
        student_logits, teacher_logits: (..., vocabulary), any float dtype; computed in fp32.
        temperature: Divides both logits.

    Returns:
        A scalar. Upstream's loss is this over all positions, divided by the batch size.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    answers_only: bool = False,
) -> Tensor:
    """Mean over tokens of KL(teacher || student), and of the cross entropy of the labels if it has a weight.

    Args:
        student_logits, teacher_logits: (batch, length, vocabulary).
        labels: (batch, length), -100 where there is no answer.
        attention_mask: (batch, length); padding is left out.
        temperature: Softens both distributions.
        hard_weight: Weight of the cross entropy.
        answers_only: Whether only positions that predict an answer's token count.

    Returns:
        A scalar per token, which reads like a loss; upstream's sum over the batch reads like thousands. Zero where
        nothing counts.

    Raises:
        ValueError: if labels are needed and not given.
    """
    if labels is None and (answers_only or hard_weight):
        raise ValueError(f"answers_only={answers_only} and hard_weight={hard_weight} need labels; give them.")
    counted = torch.ones(student_logits.shape[:2], dtype=torch.bool, device=student_logits.device)
    if attention_mask is not None:
        counted &= attention_mask.bool()
    if answers_only:
        counted[:, :-1] &= labels[:, 1:] != -100
        counted[:, -1] = False
    loss = kl_sum(student_logits[counted], teacher_logits[counted], temperature) / counted.sum().clamp(min=1)
    if hard_weight:
        following = labels[:, 1:].flatten()
        hard = F.cross_entropy(student_logits[:, :-1].flatten(0, 1).float(), following, reduction="sum")
        loss = loss + hard_weight * hard / (following != -100).sum().clamp(min=1)
    return loss
