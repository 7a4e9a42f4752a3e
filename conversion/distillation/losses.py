"""The losses' common parts: what they are means over, KL divergence in chunks, gradients computed in the forward pass.

The counts of all micro-batches and processes of a step are summed before anything is divided by them, so that a step
is the same however its conversations are split.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.ssm_mmmamba import state_dtype


def token_mask(batch: dict[str, Tensor]) -> Tensor:
    """(batch, length) bool, false where a position is padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def shift_labels(labels: Tensor) -> Tensor:
    """(batch, length), the label that each position predicts: the next position's, -100 at the end."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def predicts_answer(batch: dict[str, Tensor]) -> Tensor:
    """(batch, length) bool, true where the next token is an answer's: one with a label, or one in `answer_mask`."""
    mask, labels = batch.get("answer_mask"), batch.get("labels")
    if mask is not None:
        return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return torch.zeros_like(batch["input_ids"], dtype=torch.bool) if labels is None else shift_labels(labels) != -100


def count_tokens(batch: dict[str, Tensor], include_padding: bool = False, extra_per_tile: int = 0) -> Tensor:
    """What means over a batch divide by.

    Args:
        batch: `input_ids`, and `attention_mask`, `labels`, `answer_mask` and `pixel_values` if any.
        include_padding: Whether padding counts.
        extra_per_tile: Positions of a tile in the embedding layers beyond its tokens, see `extra_positions_per_tile`.

    Returns:
        (4,) int64: positions, those of them that predict an answer's token, positions of the embedding layers, and
        positions whose next token has a label. The second and the last differ where a student wrote the answer.
    """
    mask = token_mask(batch)
    labels = batch.get("labels")
    positions = mask.numel() if include_padding else int(mask.sum())
    labelled = 0 if labels is None else int((shift_labels(labels) != -100).sum())
    tiles = 0 if batch.get("pixel_values") is None else len(batch["pixel_values"])
    return torch.tensor([positions, int(predicts_answer(batch).sum()), positions + tiles * extra_per_tile, labelled])


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, *tensors):
        # Parameters are leaves. Anything else is detached from its graph, into which backward returns its gradient.
        leaves = [tensor if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            loss = compute(*leaves)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_output):
        return None, *(gradient * grad_output for gradient in ctx.saved_tensors)


def gradients_in_forward(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`compute(*tensors)`, with gradients computed at once so that its activations are freed before it returns.

    The result takes part in autograd as usual: a sum of such losses can be differentiated by whatever drives the
    training (gradient accumulation, DDP, FSDP), while only one of them has activations in memory.

    Args:
        compute: Returns a scalar. Depends on nothing but `tensors` that needs a gradient.
        tensors: Each requires a gradient.
    """
    return _GradientsInForward.apply(compute, *tensors) if torch.is_grad_enabled() else compute(*tensors)


def kl_sum(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, divergence: str = "forward"
) -> Tensor:
    """KL divergence at a temperature, summed over positions and vocabulary and times temperature squared.

    The forward divergence, KL(teacher || student), makes the student cover all that the teacher may say; the reverse
    one, KL(student || teacher), keeps it to what the teacher would say (arXiv 2306.08543, eq. 1; 2306.13649, sec. 2).

    Args:
        student_logits, teacher_logits: (..., vocabulary), any float dtype; computed in at least fp32.
        temperature: Divides both logits.
        divergence: `forward` or `reverse`.

    Returns:
        A scalar. Upstream's loss is the forward one over all positions, divided by the batch size.
    """
    dtype = state_dtype(student_logits.dtype)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    approximation, truth = (student, teacher) if divergence == "forward" else (teacher, student)
    return F.kl_div(approximation, truth, reduction="sum", log_target=True) * temperature**2


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student_head: nn.Module,
    teacher_head: nn.Module | None,
    batch: dict[str, Tensor],
    totals: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    divergence: str = "forward",
    hard_weight: float = 0.0,
    answers_only: bool = False,
    include_padding: bool = False,
    chunk_size: int = 512,
) -> Tensor:
    """Weighted means over tokens of the KL divergence of teacher and student and of the labels' cross entropy.

    Args:
        student_hidden, teacher_hidden: (batch, length, hidden), the last hidden states, which the heads read.
        student_head, teacher_head: From hidden states to logits; without gradients of their own. The teacher's two may
            be None if `kl_weight` is 0.
        batch: `input_ids` (batch, length), and `attention_mask` and `labels` of that shape if any; padding is left
            out, and labels are -100 where there is no answer. `answer_mask`, if there is one, says instead of the
            labels which tokens are answers' (a student's own, for which there are no labels).
        totals: (4,), what the means are over, see `count_tokens`; counted in `batch` if not given.
        temperature: Softens both distributions.
        kl_weight: Weight of the KL divergence.
        divergence: See `kl_sum`.
        hard_weight: Weight of the cross entropy.
        answers_only: Whether the KL divergence counts only positions that predict an answer's token.
        include_padding: Whether padding counts, as it does upstream.
        chunk_size: Positions whose logits exist at once.

    Returns:
        A scalar per token (upstream's loss is a sum over tokens). Zero where nothing counts.

    Raises:
        ValueError: if labels are needed and not given.
    """
    labels = batch.get("labels")
    if labels is None and (answers_only or hard_weight):
        raise ValueError(f"answers_only={answers_only} and hard_weight={hard_weight} need labels; give them.")
    if totals is None:
        totals = count_tokens(batch, include_padding)
    positions, answers, _, labelled = totals.clamp(min=1).to(student_hidden.device)

    kl_mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if include_padding else token_mask(batch)
    targets = torch.full_like(batch["input_ids"], -100) if labels is None else shift_labels(labels)
    if answers_only:
        kl_mask, positions = predicts_answer(batch), answers
    if not kl_weight:
        kl_mask = torch.zeros_like(kl_mask)
    used = kl_mask | (targets != -100) if hard_weight else kl_mask
    student_hidden, kl_mask, targets = student_hidden[used], kl_mask[used], targets[used]
    if kl_weight:
        teacher_hidden = teacher_hidden[used]

    def chunk_loss(chunk: slice) -> Callable[[Tensor], Tensor]:
        def loss(hidden: Tensor) -> Tensor:
            logits, total = student_head(hidden), 0.0
            if kl_weight:
                with torch.no_grad():
                    teacher_logits = teacher_head(teacher_hidden[chunk])
                # Without labels all positions here count.
                pair = [x[kl_mask[chunk]] if hard_weight else x for x in (logits, teacher_logits)]
                total = kl_weight * kl_sum(*pair, temperature, divergence) / positions
            if hard_weight:
                hard = F.cross_entropy(
                    logits.to(state_dtype(logits.dtype)), targets[chunk], ignore_index=-100, reduction="sum"
                )
                total = total + hard_weight * hard / labelled
            return total

        return loss

    losses = []
    for start in range(0, len(student_hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        losses.append(gradients_in_forward(chunk_loss(chunk), student_hidden[chunk]))
    # An empty sum stays in the graph, so that a batch in which nothing counts has gradients, of zero.
    return torch.stack(losses).sum() if losses else student_hidden.sum() * 0.0
