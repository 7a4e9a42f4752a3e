"""Stages 1 and 2: every mixer learns the output of its layer's attention (arXiv 2502.13145, section 3.3).

The teacher runs once. At each layer the student's mixer gets the input of the teacher's attention and is compared with
the teacher's heads before the output projection, or with the attention's output behind it. Its gradients are computed
at once, so only one layer's activations are in memory at a time, and the student never runs as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration, MmMambaMixer
from mmmamba.ssm_mmmamba import Sequences, state_dtype

from .losses import count_tokens, gradients_in_forward


LOSS_SCALE = 1000.0  # upstream's factor on the mean squared error


def mamba_mixers(student: MmMambaForConditionalGeneration) -> dict[int, MmMambaMixer]:
    """The student's Mamba-2 mixers by layer."""
    return {index: layer.mamba for index, layer in enumerate(student.model.layers) if hasattr(layer, "mamba")}


class LayerwiseDistiller(nn.Module):
    """Stages 1 and 2 as a module whose forward is the loss.

    Its parameters are the mixers'; the teacher is neither trained, nor saved, nor moved with them.

    Args:
        teacher: A model whose layers are attention wherever the student's are Mamba-2.
        student: Its mixers are trained; their output projections only with `align="output"`.
        stage: 1 freezes the inherited value, key and query rows of `in_proj`; 2 trains them, too.
        include_padding: Whether padding counts, as it does upstream.
        align: What is compared: `heads`, before the output projection, as published; or `output`, behind it, of the
            whole mixer, as in MOHAWK (arXiv 2408.10189, section 3.2) and RADLADS (arXiv 2505.03005, step 1).
    """

    # FSDP shards it as one unit: a layer's gradients are computed inside this module's forward.
    _no_split_modules: list[str] = []  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(
        self,
        teacher: MmMambaForConditionalGeneration,
        student: MmMambaForConditionalGeneration,
        stage: int,
        include_padding: bool = False,
        align: str = "heads",
    ):
        super().__init__()
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))  # no submodule
        self.include_padding, self.align = include_padding, align
        self.extra_positions_per_tile = teacher.config.extra_positions_per_tile
        self.mixers = nn.ModuleDict({str(index): mixer for index, mixer in mamba_mixers(student).items()})
        for mixer in self.mixers.values():
            mixer.requires_grad_(True)
            mixer.out_proj.requires_grad_(align == "output")
            if stage == 1:
                parametrize.register_parametrization(
                    mixer.in_proj, "weight", _FrozenRows(mixer.splits[0]), unsafe=True
                )
                mixer.in_proj.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, num_items_in_batch: Tensor | None = None, **batch: Tensor) -> Tensor:
        """`LOSS_SCALE` times the mean over layers of each mixer's mean squared error.

        Args:
            num_items_in_batch: (4,), see `count_tokens`: what the means are over; counted in `batch` if not given.
            batch: The teacher's inputs; `labels` are not used.
        """
        return LOSS_SCALE / len(self.mixers) * self.errors(batch, num_items_in_batch).sum()

    def errors(
        self,
        batch: dict[str, Tensor],
        totals: Tensor | None = None,
        observe: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Mean squared error of each mixer against its layer's attention, at the place that `align` says.

        Args:
            batch: The teacher's inputs.
            totals: (4,), see `count_tokens`: what the sums over positions are divided by; those of `batch` if not
                given.
            observe: Called with the layer and what is compared, the mixer's and the attention's: (batch, length,
                heads, head_dim) with `align="heads"`, else (batch, length, hidden).

        Returns:
            (layers,), in at least fp32.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.include_padding:
            inputs.pop("attention_mask", None)
        if totals is None:
            totals = count_tokens(batch, self.include_padding, self.extra_positions_per_tile)
        embedding, language = self._valid_positions(inputs)
        num_embedding_layers = self.teacher.config.text_config.num_embedding_layers
        errors: dict[str, Tensor] = {}
        grad_enabled = torch.is_grad_enabled()

        def compare(layer: str, hidden_states: Tensor, target: Tensor) -> None:
            mixer, in_embedding = self.mixers[layer], int(layer) < num_embedding_layers
            (mask, sequences), positions = (embedding, totals[2]) if in_embedding else (language, totals[0])

            def error(*_) -> Tensor:
                # The teacher may be held in another dtype.
                compute = mixer.heads if self.align == "heads" else mixer
                found = compute(hidden_states.to(mixer.A_log.dtype), sequences)
                expected = target.view_as(found)
                if observe is not None:
                    observe(int(layer), found, expected)
                dtype = state_dtype(found.dtype)
                squared = (found.to(dtype) - expected.to(dtype)).square()
                squared = squared.mean(tuple(range(2, squared.ndim)))  # (batch, length)
                return squared[mask].sum() / positions

            with torch.set_grad_enabled(grad_enabled):
                errors[layer] = gradients_in_forward(error, *(p for p in mixer.parameters() if p.requires_grad))

        with self._hook_attention(compare), torch.no_grad():
            self.teacher.model(**inputs, use_cache=False)
        return torch.stack([errors[layer] for layer in self.mixers])

    def _valid_positions(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Sequences | None]]:
        """Of the teacher's inputs, which positions (batch, length) are no padding, and the sequences they form.

        Returns:
            Both for embedding layers, whose tiles have more positions than tokens, and both for language layers.
        """
        ids, mask, position_ids = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        packed, model, layout = position_ids is not None and mask is None, self.teacher.model, None
        if inputs.get("pixel_values") is not None:
            layout = model.patch_layout(ids, model.image_places(ids, None))

        def valid_positions(mask: Tensor | None, position_ids: Tensor | None, like: Tensor):
            valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
            return valid, Sequences.from_position_ids(position_ids) if packed else Sequences.from_mask(valid)

        language = valid_positions(mask, position_ids, ids)
        if layout is None:
            return [language, language]
        position_ids = layout.position_ids(position_ids, packed)
        return [valid_positions(layout.attention_mask(mask), position_ids, layout.patches), language]

    @contextmanager
    def _hook_attention(self, compare: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Calls `compare(layer, input of the attention, what the mixer is to give)` while the teacher runs."""
        hooks, inputs = [], {}

        def input_hook(layer):
            def hook(module, args, kwargs):
                inputs[layer] = args[0] if args else kwargs["hidden_states"]

            return hook

        def heads_hook(layer):
            def hook(module, args):
                compare(layer, inputs.pop(layer), args[0])

            return hook

        def output_hook(layer):
            def hook(module, args, output):
                compare(layer, inputs.pop(layer), output)

            return hook

        try:
            for layer in self.mixers:
                attention = self.teacher.model.layers[int(layer)].self_attn
                hooks.append(attention.register_forward_pre_hook(input_hook(layer), with_kwargs=True))
                if self.align == "heads":
                    hooks.append(attention.o_proj.register_forward_pre_hook(heads_hook(layer)))
                else:
                    hooks.append(attention.o_proj.register_forward_hook(output_hook(layer)))
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


class _FrozenRows(nn.Module):
    """A parametrization that splits a weight into its first rows, to be frozen, and the rest."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def forward(self, frozen: Tensor, trained: Tensor) -> Tensor:
        return torch.cat([frozen, trained])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[: self.rows].clone(), weight[self.rows :].clone()
