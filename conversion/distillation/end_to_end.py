"""Stage 3: the student's next-token distribution learns the teacher's (arXiv 2502.13145, section 3.3)."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.ssm_mmmamba import state_dtype

from .counting import counted, following, totals_of
from .streaming import streamed


def kl_sum(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at a temperature, summed over rows and vocabulary and times temperature squared.

    Args:
        student_logits, teacher_logits: (..., vocabulary), any float dtype; computed in at least fp32.
        temperature: Divides both logits.

    Returns:
        A scalar. Upstream's loss is this over all positions, divided by the batch size.
    """
    acc = state_dtype(student_logits.dtype)
    student = F.log_softmax(student_logits.to(acc) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.to(acc) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def distillation_loss(
    student_rows: Tensor,
    teacher_rows: Tensor,
    student_head: nn.Module,
    teacher_head: nn.Module,
    batch: dict[str, Tensor],
    totals: Tensor | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    answers_only: bool = False,
    include_padding: bool = False,
    chunk_size: int = 512,
) -> Tensor:
    """Mean over tokens of KL(teacher || student), and of the cross entropy of the labels if it has a weight.

    Args:
        student_rows, teacher_rows: (batch, length, hidden), what the heads read.
        student_head, teacher_head: Rows to logits; without gradients of their own.
        batch: `input_ids` (batch, length), and `attention_mask` and `labels` of that shape if any; padding is left
            out, and labels are -100 where there is no answer.
        totals: (2,), positions and answers that the means are over; those of `batch` if not given.
        temperature: Softens both distributions.
        hard_weight: Weight of the cross entropy.
        answers_only: Whether only positions that predict an answer's token count.
        include_padding: Whether padding counts, as it does upstream.
        chunk_size: Positions whose logits exist at once.

    Returns:
        A scalar per token, which reads like a loss; upstream's sum over the batch reads like thousands. Zero where
        nothing counts.

    Raises:
        ValueError: if labels are needed and not given.
    """
    labels = batch.get("labels")
    if labels is None and (answers_only or hard_weight):
        raise ValueError(f"answers_only={answers_only} and hard_weight={hard_weight} need labels; give them.")
    if totals is None:
        totals = totals_of(batch, include_padding)
    positions, answers = (total.clamp(min=1).to(student_rows.device) for total in totals)

    soft = torch.ones_like(batch["input_ids"], dtype=torch.bool) if include_padding else counted(batch)
    targets = torch.full_like(batch["input_ids"], -100) if labels is None else following(labels)
    if answers_only:
        soft, positions = targets != -100, answers
    used = soft | (targets != -100) if hard_weight else soft
    student_rows, teacher_rows, soft, targets = student_rows[used], teacher_rows[used], soft[used], targets[used]

    def loss_of(chunk: slice) -> Callable[..., Tensor]:
        def loss(rows: Tensor) -> Tensor:
            logits = student_head(rows)
            with torch.no_grad():
                truth = teacher_head(teacher_rows[chunk])
            loss = kl_sum(logits[soft[chunk]], truth[soft[chunk]], temperature) / positions
            if hard_weight:
                hard = F.cross_entropy(
                    logits.to(state_dtype(logits.dtype)), targets[chunk], ignore_index=-100, reduction="sum"
                )
                loss = loss + hard_weight * hard / answers
            return loss

        return loss

    losses = []
    for start in range(0, len(student_rows), chunk_size):
        chunk = slice(start, start + chunk_size)
        losses.append(streamed(loss_of(chunk), student_rows[chunk]))
    # An empty sum still belongs to the graph: a batch in which nothing counts trains nothing and fails nothing.
    return torch.stack(losses).sum() if losses else student_rows.sum() * 0.0


class EndToEndDistiller(nn.Module):
    """Stage 3 as a module whose forward is the loss.

    Only the student is its parameters; the teacher is held beside it and never trained or saved with it.

    Args:
        teacher: The model to learn from.
        student: Of the same vocabulary.
        trainable: `mixers`: all of each mixer but its output projection, A_log and dt_bias included (upstream's list
            leaves those two out, so they stay at their random start); `mixers+o_proj`: the output projections, too;
            `decoder`: all layers.
        options: Of `distillation_loss`.
    """

    _no_split_modules: list[str] = ["MmMambaDecoderLayer"]  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, teacher, student: MmMambaForConditionalGeneration, trainable: str = "mixers", **options):
        super().__init__()
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.student, self.options = student, options
        if student.lm_head.weight is student.model.embed_tokens.weight:  # a checkpoint takes no tensor under two names
            student.lm_head = copy.deepcopy(student.lm_head)
        for name, parameter in student.named_parameters():
            in_mixer = ".mamba." in name and (trainable == "mixers+o_proj" or ".out_proj." not in name)
            parameter.requires_grad_(".layers." in name if trainable == "decoder" else in_mixer)

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> Tensor:
        """See `distillation_loss`; `num_items_in_batch` are its totals, `batch` the models' inputs and `labels`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            truth = self.teacher.model(**inputs, use_cache=False).last_hidden_state
        rows = self.student.model(**inputs, use_cache=False).last_hidden_state
        return distillation_loss(
            rows, truth, self.student.lm_head, self.teacher.lm_head, batch, num_items_in_batch, **self.options
        )

    @staticmethod
    def student_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From this module's state dict to names and tensors of the student's."""
        return {name.removeprefix("student."): tensor for name, tensor in state.items()}
