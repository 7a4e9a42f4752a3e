"""Stages 1 and 2: every mixer learns what its layer's attention gives, layer by layer.

The teacher runs once. At each layer the student's mixer gets the very input of the teacher's attention and is compared
with the teacher's heads before the output projection; its gradients are computed on the spot, so only one layer's
activations are alive at a time and the student never runs as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaMixer, Padding


STAGE_1 = ("conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "norm.weight", "in_proj.weight")
STAGE_2 = STAGE_1  # in_proj as a whole: stage 1 holds its value, key and query rows still (see `HeldRows`)
SCALE = 1000.0  # upstream's factor on the mean squared error


def mixers(student: MmMambaForConditionalGeneration) -> dict[int, MmMambaMixer]:
    """The student's Mamba-2 mixers by layer."""
    return {index: layer.mamba for index, layer in enumerate(student.model.layers) if hasattr(layer, "mamba")}


def layer_errors(
    teacher: MmMambaForConditionalGeneration,
    student_mixers: dict[int, MmMambaMixer],
    batch: dict[str, Tensor],
    backward: bool = False,
    include_padding: bool = False,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Mean squared error of each mixer's heads against its layer's attention heads.

    Args:
        teacher: All attention at the layers of `student_mixers`; runs without gradients.
        student_mixers: Mixers by layer.
        batch: The teacher's inputs.
        backward: Whether to add the gradients of `SCALE * mean over layers` to the mixers' parameters at once.
        include_padding: Whether padding counts, as it does upstream.
        observe: Called with layer, student heads and teacher heads, both (batch, length, heads, head_dim).

    Returns:
        (layers,), fp32, in the order of `student_mixers`.
    """
    mask = batch.get("attention_mask")
    padded = mask is not None and not include_padding and not bool(mask.all())
    padding = Padding(mask) if padded else None
    errors: dict[int, Tensor] = {}

    def learn(layer: int, hidden_states: Tensor, target: Tensor) -> None:
        with torch.set_grad_enabled(backward):
            heads = student_mixers[layer].heads(hidden_states, padding)
            target = target.view_as(heads)
            squared = (heads.float() - target.float()).square().mean((2, 3))  # (batch, length)
            error = (squared * mask).sum() / mask.sum() if padded else squared.mean()
            if backward:
                (error * SCALE / len(student_mixers)).backward()
        errors[layer] = error.detach()
        if observe is not None:
            observe(layer, heads, target)

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _attention_seen(teacher, student_mixers, learn), torch.no_grad():
        teacher.model(**inputs, use_cache=False)
    return torch.stack([errors[layer] for layer in student_mixers])


@contextmanager
def _attention_seen(teacher, layers, learn: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
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
        for layer in layers:
            attention = teacher.model.layers[layer].self_attn
            hooks.append(attention.register_forward_pre_hook(remember(layer), with_kwargs=True))
            hooks.append(attention.o_proj.register_forward_pre_hook(compare(layer)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class HeldRows:
    """Keeps the value, key and query rows of each `in_proj` as they are while the gate and dt rows train (stage 1).

    Their gradients are zeroed as they arise, so that gradient clipping does not see them, and the rows are put back
    after every step, as weight decay moves them all the same.
    """

    def __init__(self, student_mixers: dict[int, MmMambaMixer]):
        self.held = [
            (m.in_proj.weight, m.in_proj.weight[: m.splits[0]].detach().clone()) for m in student_mixers.values()
        ]
        self.hooks = [weight.register_hook(self._without_gradient(len(rows))) for weight, rows in self.held]

    @staticmethod
    def _without_gradient(rows: int) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.cat([torch.zeros_like(gradient[:rows]), gradient[rows:]])

    @property
    def numel(self) -> int:
        """How many values are held."""
        return sum(rows.numel() for _, rows in self.held)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undoes what the last optimiser step did to the held rows."""
        for weight, rows in self.held:
            weight[: len(rows)] = rows

    def release(self) -> None:
        """Lets the rows train again."""
        for hook in self.hooks:
            hook.remove()


def parameter_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float = 0.05) -> list[dict]:
    """Optimiser groups: no weight decay on A_log, dt_bias, norms and biases."""
    free = ("A_log", "dt_bias", "norm.weight", "bias")
    decayed = [p for name, p in named if not name.endswith(free)]
    kept = [p for name, p in named if name.endswith(free)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
