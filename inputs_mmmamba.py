"""What a stack of layers is given beside its hidden states: attention masks, positions, and what belongs together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache_mmmamba import MmMambaCache
from .configuration_mmmamba import MmMambaTextConfig
from .hd_mmmamba import PatchLayout
from .ssm_mmmamba import Sequences


class StackInputs(NamedTuple):
    """Arguments of a stack's layers.

    Attributes:
        masks: By type of layer.
        position_ids: (B or 1, L); None where no layer sees positions.
        kwargs: Further keyword arguments.
    """

    masks: dict[str, Tensor | Sequences | None]
    position_ids: Tensor | None
    kwargs: dict[str, Any]


def packed_sequences(rows: Tensor, attention_mask, position_ids: Tensor | None) -> Sequences | None:
    """The sequences of rows (B, L, D) that have no mask and whose positions restart; None if none do."""
    if attention_mask is not None or position_ids is None or rows.shape[1] == 1:
        return None
    return Sequences.from_position_ids(position_ids.expand(len(rows), -1))


def token_positions(rows: Tensor, attention_mask: Tensor | dict | None, cache: MmMambaCache | None) -> Tensor:
    """Positions (B or 1, L) of rows (B, L, D), which count valid tokens; padding gets position 1, as in upstream."""
    length = rows.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 1)[:, -length:]
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + length)[None]


def stack_inputs(
    config: MmMambaTextConfig,
    layer_types: list[str],
    rows: Tensor,
    attention_mask: Tensor | dict | None,
    position_ids: Tensor | None,
    cache: MmMambaCache | None,
    sequences: Sequences | None,
) -> StackInputs:
    """What layers of these types are given.

    Args:
        config: Of the decoder.
        layer_types: Of these layers.
        rows: (B, L, D), their input.
        attention_mask: (B, past + L), 1 for valid tokens; or the masks themselves, by type of layer.
        position_ids: (B or 1, L).
        cache: What these layers have read.
        sequences: Of packed rows, see `packed_sequences`.
    """
    masks, attends = {"full_attention": None, "linear_attention": sequences}, "full_attention" in layer_types
    if isinstance(attention_mask, dict):
        masks |= attention_mask
    else:
        if attends:
            padding = attention_mask
            if padding is None and cache is not None:
                padding = cache.filled(*rows.shape[:2], rows.device)  # `len` would fix an exported size
            # By position: the cache's argument has another name in every second version of Transformers.
            restarting = None if sequences is None else position_ids
            masks["full_attention"] = create_causal_mask(config, rows, padding, cache, restarting)
        if attention_mask is not None and "linear_attention" in layer_types:
            masks["linear_attention"] = Sequences.from_attention_mask(attention_mask, rows.shape[1])
    position_ids = position_ids.to(rows.device) if attends else None
    return StackInputs(masks, position_ids, {} if sequences is None else sequences.attention_kwargs())


def inputs_of_both_stacks(
    config: MmMambaTextConfig,
    layout: PatchLayout | None,
    token_rows: Tensor,
    patch_rows: Tensor,
    attention_mask: Tensor | dict | None,
    position_ids: Tensor | None,
    cache: MmMambaCache | None,
    sequences: Sequences | None,
) -> tuple[StackInputs, StackInputs]:
    """What the embedding layers are given, and the language layers; the same, but in HoVLE-HD.

    Args:
        layout: How the embedding layers' sequence differs, if it does.
        token_rows: (B, L, D), the language layers' input.
        patch_rows: (B, C, D), the embedding layers' input.

    The other arguments are those of `stack_inputs`.

    Raises:
        ValueError: if rows of a packed batch have pictures in different places.
    """
    if position_ids is None:
        position_ids = token_positions(token_rows, attention_mask, cache)
    if layout is None:
        inputs = stack_inputs(config, config.layer_types, token_rows, attention_mask, position_ids, cache, sequences)
        return inputs, inputs
    split = config.num_embedding_layers
    caches = (None, None) if cache is None else (cache.part(slice(split)), cache.part(slice(split, None)))
    language = stack_inputs(
        config, config.layer_types[split:], token_rows, attention_mask, position_ids, caches[1], sequences
    )
    mask = layout.attention_mask(attention_mask)
    position_ids = layout.position_ids(position_ids, packed=sequences is not None)
    if sequences is not None:
        if mask is not None:
            raise ValueError(
                "Rows of a packed batch have pictures in different places, which a model with pixel_shuffle_loc='post'"
                " cannot read; pack all sequences into one row."
            )
        sequences = packed_sequences(patch_rows, None, position_ids)
    embedding = stack_inputs(config, config.layer_types[:split], patch_rows, mask, position_ids, caches[0], sequences)
    return embedding, language
