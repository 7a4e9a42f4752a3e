"""Stages 1 and 2: every mixer learns what its layer's attention gives, layer by layer (arXiv 2502.13145, section 3.3).

The teacher runs once. At each layer the student's mixer gets the very input of the teacher's attention and is compared
with the teacher's heads before the output projection; its gradients are computed on the spot, so only one layer's
activations are alive at a time and the student never runs as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaMixer
from mmmamba.ssm_mmmamba import Sequences, state_dtype

from .counting import counted, totals_of
from .streaming import streamed


SCALE = 1000.0  # upstream's factor on the mean squared error


def mixers(student: MmMambaForConditionalGeneration) -> dict[int, MmMambaMixer]:
    """The student's Mamba-2 mixers by layer."""
    return {index: layer.mamba for index, layer in enumerate(student.model.layers) if hasattr(layer, "mamba")}


class LayerwiseDistiller(nn.Module):
    """Stages 1 and 2 as a module whose forward is the loss.

    Only the mixers are its parameters; the teacher is held beside them and never trained, moved to their device or
    saved with them.

    Args:
        teacher: A model whose layers are attention wherever the student's are Mamba-2.
        student: Its mixers are trained, but for their output projections.
        stage: 1 holds the inherited value, key and query rows of `in_proj` still; 2 trains them, too.
        include_padding: Whether padding counts as if it were text, as it does upstream.
    """

    # Trained as one unit when sharded: a layer's gradients are computed inside this module's forward.
    _no_split_modules: list[str] = []  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, teacher, student: MmMambaForConditionalGeneration, stage: int, include_padding: bool = False):
        super().__init__()
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.include_padding = include_padding
        self.mixers = nn.ModuleDict({str(index): mixer for index, mixer in mixers(student).items()})
        for mixer in self.mixers.values():
            mixer.requires_grad_(True)
            mixer.out_proj.requires_grad_(False)
            if stage == 1:
                parametrize.register_parametrization(mixer.in_proj, "weight", _HeldRows(mixer.splits[0]), unsafe=True)
                mixer.in_proj.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> Tensor:
        """`SCALE` times the mean over layers of each mixer's mean squared error.

        Args:
            num_items_in_batch: (2,), positions and answers that the means are over; those of `batch` if not given.
            batch: The teacher's inputs; `labels` are not used.
        """
        totals = totals_of(batch, self.include_padding) if num_items_in_batch is None else num_items_in_batch
        return SCALE / len(self.mixers) * self.errors(batch, totals[0]).sum()

    def errors(
        self,
        batch: dict[str, Tensor],
        positions: Tensor | int | None = None,
        observe: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Mean squared error of each mixer's heads against its layer's attention heads.

        Args:
            batch: The teacher's inputs.
            positions: What the squares' sum over positions is divided by; the positions of `batch` if not given.
            observe: Called with layer, student heads and teacher heads, both (batch, length, heads, head_dim).

        Returns:
            (layers,), in at least fp32.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        mask, sequences = counted(batch), None
        if "position_ids" in batch and "attention_mask" not in batch:
            sequences = Sequences.from_position_ids(batch["position_ids"])
        elif self.include_padding:
            mask = torch.ones_like(mask)
            inputs.pop("attention_mask", None)
        else:
            sequences = Sequences.from_mask(mask)
        positions = mask.sum() if positions is None else positions
        errors: dict[str, Tensor] = {}
        learning = torch.is_grad_enabled()

        def learn(layer: str, hidden_states: Tensor, target: Tensor) -> None:
            mixer = self.mixers[layer]

            def error(*_) -> Tensor:
                # The teacher may be held in another dtype.
                heads = mixer.heads(hidden_states.to(mixer.A_log.dtype), sequences)
                true_heads = target.view_as(heads)
                if observe is not None:
                    observe(int(layer), heads, true_heads)
                acc = state_dtype(heads.dtype)
                squared = (heads.to(acc) - true_heads.to(acc)).square().mean((2, 3))  # (batch, length)
                return squared[mask].sum() / positions

            with torch.set_grad_enabled(learning):
                errors[layer] = streamed(error, *(p for p in mixer.parameters() if p.requires_grad))

        with self._attention_seen(learn), torch.no_grad():
            self.teacher.model(**inputs, use_cache=False)
        return torch.stack([errors[layer] for layer in self.mixers])

    @contextmanager
    def _attention_seen(self, learn: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Calls `learn(layer, input of the attention, its heads before o_proj)` while the teacher runs."""
        hooks, inputs = [], {}

        def remember(layer):
            def hook(module, args, kwargs):
                inputs[layer] = args[0] if args else kwargs["hidden_states"]

            return hook

        def compare(layer):
            def hook(module, args):
                learn(layer, inputs.pop(layer), args[0])

            return hook

        try:
            for layer in self.mixers:
                attention = self.teacher.model.layers[int(layer)].self_attn
                hooks.append(attention.register_forward_pre_hook(remember(layer), with_kwargs=True))
                hooks.append(attention.o_proj.register_forward_pre_hook(compare(layer)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def student_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From this module's state dict to names and tensors of the student's."""
        tensors = {}
        for name, tensor in state.items():
            if name.endswith("original1"):
                continue
            if name.endswith("original0"):
                tensor = torch.cat([tensor, state[name.removesuffix("0") + "1"]])
                name = name.removesuffix(".parametrizations.weight.original0") + ".weight"
            _, layer, rest = name.split(".", 2)
            tensors[f"model.layers.{layer}.mamba.{rest}"] = tensor
        return tensors


class _HeldRows(nn.Module):
    """Splits a weight into its first rows, which are held still, and the rest."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def forward(self, held: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([held, rest])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[: self.rows].clone(), weight[self.rows :].clone()
