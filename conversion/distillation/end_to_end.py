"""Stage 3: the student's next-token distribution learns the teacher's (arXiv 2502.13145, section 3.3).

Without a teacher it is stage 4, supervised fine-tuning on labels.
"""

import copy

import torch
from torch import Tensor, nn

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .losses import distillation_loss


class EndToEndDistiller(nn.Module):
    """Stages 3 and 4 as a module whose forward is the loss.

    Its parameters are the student's; the teacher is neither trained, nor saved, nor moved with it.

    Args:
        teacher: The model to learn from; None if `kl_weight` is 0.
        student: Of the same vocabulary.
        trainable: `mixers`: all of each mixer but its output projection, A_log and dt_bias included (upstream's list
            leaves those two out, so they keep their random initial values); `mixers+o_proj`: the output projections,
            too; `decoder`: all layers.
        options: Of `distillation_loss`.
    """

    _no_split_modules: list[str] = ["MmMambaDecoderLayer"]  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(
        self,
        teacher: MmMambaForConditionalGeneration | None,
        student: MmMambaForConditionalGeneration,
        trainable: str = "mixers",
        **options,
    ):
        super().__init__()
        if teacher is not None:
            teacher = teacher.eval().requires_grad_(False)
        learns_from_teacher = options.get("kl_weight", 1.0) > 0
        object.__setattr__(self, "teacher", teacher if learns_from_teacher else None)  # no submodule
        self.extra_positions_per_tile = student.config.extra_positions_per_tile
        self.student, self.options = student, options
        if student.lm_head.weight is student.model.embed_tokens.weight:  # a checkpoint takes no tensor under two names
            student.lm_head = copy.deepcopy(student.lm_head)
        for name, parameter in student.named_parameters():
            in_mixer = ".mamba." in name and (trainable == "mixers+o_proj" or ".out_proj." not in name)
            parameter.requires_grad_(".layers." in name if trainable == "decoder" else in_mixer)

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> Tensor:
        """See `distillation_loss`: `num_items_in_batch` are its totals, `batch` the models' inputs and its own."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "answer_mask")}
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            teacher_head = self.teacher.lm_head
            with torch.no_grad():
                teacher_hidden = self.teacher.model(**inputs, use_cache=False).last_hidden_state
        student_hidden = self.student.model(**inputs, use_cache=False).last_hidden_state
        return distillation_loss(
            student_hidden,
            teacher_hidden,
            self.student.lm_head,
            teacher_head,
            batch,
            num_items_in_batch,
            **self.options,
        )

    @staticmethod
    def student_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From this module's state dict to names and tensors of the student's."""
        return {name.removeprefix("student."): tensor for name, tensor in state.items()}
