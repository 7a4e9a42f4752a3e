"""HoVLE-HD: the embedding layers read every patch, the language layers one row for each 2x2 of them.

A prompt holds the image tokens of the language layers. For the embedding layers each of them becomes the four patches
of its place in the sequence, row by row of the tile; behind these layers, 2x2 neighbours are put together again. So an
image token needs patches of two rows, and a tile can be read in pieces that are pairs of its rows ("lines" of tokens).
Letters as in `modeling_mmmamba`; C columns, the longer length of the embedding layers.
"""

import torch
from torch import Tensor


PATCHES_PER_TOKEN = 4


def num_columns(image_places: Tensor) -> int:
    """Columns of the embedding layers for tokens of which these (B, L) are image tokens."""
    return image_places.shape[1] + (PATCHES_PER_TOKEN - 1) * int(image_places.any(0).sum())


class PatchLayout:
    """From the sequence of a prompt's tokens to that of the embedding layers, and back.

    Where any row of the batch has an image token, all rows have four columns; in the other rows three of these are
    padding. So the rows stay aligned, and all that must be remembered is where image tokens stood.

    Args:
        image_places: (B, past + L), bool, where pictures stand.
        length: L, the tokens at hand. Columns below are those of these tokens unless all are named.
        tokens_per_line: Image tokens that two rows of patches of a tile give.

    Attributes:
        image_places: As given.
        past: Columns before those at hand.
        patches: (B, C), bool, where patches stand.

    Raises:
        ValueError: if the image tokens at hand are no whole lines.
    """

    def __init__(self, image_places: Tensor, length: int, tokens_per_line: int):
        self.image_places, self.new_places = image_places, image_places[:, image_places.shape[1] - length :]
        self._check_lines(tokens_per_line)
        tokens = torch.arange(image_places.shape[1], device=image_places.device)
        widths = torch.where(image_places.any(0), PATCHES_PER_TOKEN, 1)
        self._token = tokens.repeat_interleave(widths)  # (past + C,), the token of each column
        self._is_first = self._token.diff(prepend=self._token.new_full((1,), -1)) > 0
        patches = image_places[:, self._token]
        self._valid = patches | self._is_first  # (B, past + C)
        self._extra = patches & ~self._is_first
        self.past = len(self._token) - int(widths[len(tokens) - length :].sum())
        self._new_token = self._token[self.past :] - (len(tokens) - length)  # (C,), counted from the first at hand
        self.patches = patches[:, self.past :]

    def _check_lines(self, tokens_per_line: int) -> None:
        rows, tokens = self.new_places.nonzero(as_tuple=True)
        whole = len(rows) % tokens_per_line == 0
        if whole and len(rows):
            rows, tokens = rows.view(-1, tokens_per_line), tokens.view(-1, tokens_per_line)
            in_order = tokens - tokens[:, :1] == torch.arange(tokens_per_line, device=tokens.device)
            whole = bool((in_order & (rows == rows[:, :1])).all())
        if not whole:
            raise ValueError(
                f"The image tokens at hand are no whole lines of {tokens_per_line}, which are shuffled together; give "
                "all image tokens of a tile at once and without anything between them."
            )

    def expand(self, token_rows: Tensor, image_rows: Tensor | None) -> Tensor:
        """The embedding layers' input.

        Args: token_rows (B, L, D); image_rows (..., D), all patches in order, or None if there are none.
        Returns: (B, C, D).
        Raises: ValueError, if places and patches differ in number.
        """
        rows = token_rows[:, self._new_token]
        if image_rows is None:
            return rows
        image_rows = image_rows.reshape(-1, rows.shape[-1]).to(rows.device, rows.dtype)
        if (places := int(self.patches.sum())) != len(image_rows):
            raise ValueError(
                f"The prompt has {places // PATCHES_PER_TOKEN} image tokens but the pictures give {len(image_rows)} "
                f"patches, {PATCHES_PER_TOKEN} for each; use the processor, or repeat <IMG_CONTEXT> as often."
            )
        return rows.masked_scatter(self.patches[..., None], image_rows)

    def contract(self, hidden_states: Tensor, shuffle) -> Tensor:
        """The language layers' input.

        Args:
            hidden_states: (B, C, D), the embedding layers' output.
            shuffle: From `patches` (patches, D) to rows (patches / 4, D).

        Returns:
            (B, L, D).
        """
        rows = hidden_states[:, self._is_first[self.past :]]
        if hidden_states.shape[1] == rows.shape[1]:
            return rows
        return rows.masked_scatter(self.new_places[..., None], shuffle(patches=hidden_states[self.patches]))

    def attention_mask(self, mask: Tensor | None) -> Tensor | None:
        """Which columns are valid, all of them: (B, past + C), or None if that is each.

        Args: mask (B, past + L), 1 for valid tokens; all are if None.
        Raises: ValueError, for a mask of another shape.
        """
        if mask is None:
            return None if self._valid.all() else self._valid
        shape = tuple(self.image_places.shape)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {given}; where pictures were read, a model with pixel_shuffle_loc='post' needs "
                f"one of shape (batch, tokens so far), here {shape}."
            )
        return self._valid & mask.to(self._token.device).bool()[:, self._token]

    def position_ids(self, position_ids: Tensor | None, packed: bool = False) -> Tensor | None:
        """The embedding layers' positions, which count patches.

        Args:
            position_ids: (B or 1, L), of the tokens; or None.
            packed: Whether a new sequence begins wherever they do not go up by one.

        Returns:
            (B, C), or None.
        """
        if position_ids is None:
            return None
        before = self._extra.cumsum(1)  # (B, past + C)
        position_ids = position_ids.to(before.device)
        if packed:
            begins = (position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1)[:, self._token] & self._is_first
            before = before - torch.where(begins, before, 0).cummax(1).values
        return position_ids[:, self._new_token] + before[:, self.past :]
