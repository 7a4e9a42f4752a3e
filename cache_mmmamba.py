"""What a model has read: keys and values of attention layers, convolution and recurrent states of Mamba-2 layers.

This is the one file that knows the fields of Transformers' cache layers. Everything else asks by name: `conv_state`,
`recurrent_state`, `keys`, `values`, `get_seq_length`, `crop`.
"""

import copy
import dataclasses
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .hd_mmmamba import num_columns


# The name of the cache in the arguments of `generate` and in model outputs: "cache" since Transformers 5.24.
CACHE = "cache" if "cache" in {x.name for x in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class MmMambaKeyValueLayer(DynamicLayer):
    """Keys and values that grow in place: a step writes one column, where Transformers' own layer copies them all."""

    buffers: tuple[Tensor, Tensor] | None = None  # `keys` and `values` are views of their beginnings

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Args: (batch, heads, new tokens, head_dim) each. Returns all keys and all values."""
        # Autograd may have saved the buffers for a backward pass, and a compiled graph has no use for them.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self._fits(key_states, stop):
            capacity = stop + max(256, stop // 8) if start else stop + 256
            self.buffers = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key_states, value_states))
            for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer[:, :, :start] = old
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def _fits(self, key_states: Tensor, length: int) -> bool:
        """Whether the buffers hold what was read, may be written, and have room for `length` tokens."""
        if self.buffers is None:
            return False
        keys, _ = self.buffers
        # Whoever crops or reorders a cache puts other tensors in the place of `keys` and `values`.
        still_views = keys.data_ptr() == self.keys.data_ptr() and keys.shape[:2] == key_states.shape[:2]
        return still_views and keys.shape[2] >= length and _writable(keys)


class MmMambaCache(DynamicCache):
    """The cache of one batch: growing keys and values (attention), states of fixed size (Mamba-2).

    Args:
        config: The model's, or its `text_config`.
        max_cache_len: Gives keys and values this fixed length in tokens, as Transformers' `StaticCache` does.
        offloading: Keeps keys and values of attention layers on the CPU while other layers run.

    Attributes:
        image_places: (batch, tokens), bool: image tokens that embedding layers with attention have read as several
            patches (`hd_mmmamba`), so that they hold more keys than tokens were read; None if there are none.

    Raises:
        ValueError: if `offloading` is asked for and no layer is attention.
    """

    is_compileable = False  # `generate` has its own way to make steps fast, see `capture_mmmamba`
    image_places: Tensor | None = None
    num_embedding_layers: int | None = None  # of caches made elsewhere, see `wrapping`

    def __init__(self, config, max_cache_len: int | None = None, offloading: bool = False):
        kinds = config.get_text_config().layer_types
        self.num_embedding_layers = config.get_text_config().num_embedding_layers
        if offloading and "full_attention" not in kinds:
            raise ValueError("An offloaded cache moves keys and values, which a model without attention has not got.")
        self._layer_options = {"max_cache_len": max_cache_len, "in_place": not offloading}
        # As any cache of given layers: `DynamicCache` would choose other ones.
        Cache.__init__(self, layers=[_new_layer(kind, **self._layer_options) for kind in kinds], offloading=offloading)
        self._read = 0

    @classmethod
    def wrapping(cls, cache: Cache, config) -> "MmMambaCache":
        """Transformers' own caches in the form the network uses; the layers are shared, so both see what is read.

        Args:
            cache: A `DynamicCache` or `StaticCache`, made with or without a config; or an `MmMambaCache`.
            config: The model's `text_config`.

        Raises:
            ValueError: if it is no cache, or one of another kind of model.
        """
        layers = getattr(cache, "layers", None)
        if not isinstance(layers, list):
            raise ValueError(
                f"A {type(cache).__name__} cannot be this model's cache; pass model.new_cache(), or "
                "DynamicCache(config=model.config)."
            )
        if not layers:  # DynamicCache() learns its layers while it is filled
            layers.extend(_new_layer(kind) for kind in config.layer_types)
        kinds = ["linear_attention" if isinstance(x, LinearAttentionLayer) else "full_attention" for x in layers]
        if kinds != config.layer_types:
            raise ValueError(
                f"The {type(cache).__name__} has {kinds.count('full_attention')} attention and "
                f"{kinds.count('linear_attention')} state layers in another order or number than this model's "
                f"{len(config.layer_types)} layers; pass model.new_cache(), or DynamicCache(config=model.config)."
            )
        if hasattr(cache, "advance"):
            return cache
        wrapper = cls.__new__(cls)
        wrapper.__dict__.update(cache.__dict__)
        wrapper._layer_options = {}
        wrapper._read = int(cache.get_seq_length()) if wrapper.attention_layers else 0
        return wrapper

    # --- length ------------------------------------------------------------------------------------------------------

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that keep keys and values."""
        return [index for index, layer in enumerate(self.layers) if not isinstance(layer, LinearAttentionLayer)]

    @property
    def state_layers(self) -> list[int]:
        """Indices of the layers that keep states."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included; a model without attention counts them, too."""
        for layer in self.layers if self.image_places is None else self.layers[self.num_embedding_layers :]:
            if isinstance(layer, DynamicLayer):  # others may have cropped it
                return layer.get_seq_length()
        return self._read

    @property
    def can_hold_patches(self) -> bool:
        """Whether embedding layers may hold more keys than the others."""
        return self.num_embedding_layers is not None and self.capacity is None

    def part(self, layers: slice) -> "MmMambaCache":
        """A view of some layers, which knows how much these hold."""
        part = copy.copy(self)
        part.layers, part.image_places = self.layers[layers], None
        return part

    @property
    def capacity(self) -> int | None:
        """Tokens that keys and values of fixed length have room for; None if they grow, or there are none."""
        return next((layer.max_cache_len for layer in self.layers if isinstance(layer, StaticLayer)), None)

    def filled(self, rows: int, tokens: int, device: torch.device) -> Tensor | None:
        """What of keys and values of fixed length will be filled when so many tokens more are read.

        Returns:
            (rows, capacity), bool; None if they grow, or there are none.
        """
        if self.capacity is None:
            return None
        filled = torch.arange(self.capacity, device=device) < self.get_seq_length() + tokens
        return filled.expand(rows, -1)

    def advance(self, tokens: int, image_places: Tensor | None = None) -> None:
        """Says that all layers have read so many tokens more, and where all `image_places` are, if there are any."""
        self._read += tokens
        if image_places is not None and any(i < self.num_embedding_layers for i in self.attention_layers):
            self.image_places = image_places

    def forget_length(self, tokens: int) -> None:
        """Counts on as if only so many tokens had been read, which is all the same to states.

        Raises:
            ValueError: if layers attend: positions of their keys count from the first token.
        """
        if self.attention_layers:
            raise ValueError(
                "Attention layers keep keys and values of every token that was read; only a model whose layers are "
                "all linear_attention can forget how many there were."
            )
        self._read = tokens

    def _columns_removed(self, layer_idx: int, length: int) -> int:
        """Minus the keys of a layer that do not belong to the first `length` tokens."""
        if self.image_places is not None and layer_idx < self.num_embedding_layers:
            length = num_columns(self.image_places[:, :length])
        return length - int(self.layers[layer_idx].get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ValueError: if a layer keeps a state, which cannot forget, or the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is ambiguous; give minus the number of tokens to remove.")
        if tokens_to_remove and self.state_layers:
            raise ValueError("The states of Mamba-2 layers cannot forget tokens; use snapshot() before and restore().")
        if tokens_to_remove:
            self._crop_to(max(0, self.get_seq_length() + tokens_to_remove))

    def _crop_to(self, length: int) -> None:
        """Forgets keys and values behind so many tokens."""
        for index in self.attention_layers:  # one by one: a failure may have come between two of them
            if removed := self._columns_removed(index, length):
                self.layers[index].crop(removed)
        self._read = length
        if self.image_places is not None:
            places = self.image_places[:, :length]
            self.image_places = places if places.any() else None

    def reset(self) -> None:
        """Empties the cache."""
        kinds = ["linear_attention" if isinstance(x, LinearAttentionLayer) else "full_attention" for x in self.layers]
        self.layers[:] = [_new_layer(kind, **self._layer_options) for kind in kinds]
        self._read, self.image_places = 0, None

    @property
    def batch_size(self) -> int | None:
        """Rows; None while nothing was read."""
        tensors = self.tensors()
        return len(next(iter(tensors.values()))) if tensors else None

    def repeat_rows(self, repeats: int) -> None:
        """Repeats every row, (a, b) to (a, a, b, b): for beams, and for several answers to one prompt."""
        if repeats > 1 and (rows := self.batch_size) is not None:
            device = next(iter(self.tensors().values())).device
            self.reorder_cache(torch.arange(rows, device=device).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts other rows, or the same in another order, in the rows' places."""
        super().reorder_cache(beam_idx)
        if self.image_places is not None:
            self.image_places = self.image_places.index_select(0, beam_idx.to(self.image_places.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As `reorder_cache`."""
        super().batch_select_indices(indices)
        if self.image_places is not None:
            self.image_places = self.image_places[indices.to(self.image_places.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `repeat_rows`."""
        super().batch_repeat_interleave(repeats)
        if self.image_places is not None:
            self.image_places = self.image_places.repeat_interleave(repeats, 0)

    # --- what the layers keep ----------------------------------------------------------------------------------------

    def conv_state(self, layer_idx: int) -> Tensor | None:
        """Last inputs of a convolution, (batch, channels, taps - 1); None while nothing was read."""
        layer = self.layers[layer_idx]
        return _own(layer.conv_states) if layer.has_previous_state[0] else None

    def recurrent_state(self, layer_idx: int) -> Tensor | None:
        """State of a Mamba-2 layer, (batch, heads, head_dim, head_dim) in fp32; None while nothing was read."""
        layer = self.layers[layer_idx]
        return _own(layer.recurrent_states) if layer.has_previous_state[0] else None

    def keys(self, layer_idx: int) -> Tensor | None:
        """Keys of an attention layer, (batch, key/value heads, length, head_dim); None while nothing was read."""
        return self.layers[layer_idx].keys

    def values(self, layer_idx: int) -> Tensor | None:
        """Values, as `keys`."""
        return self.layers[layer_idx].values

    def update_states(self, layer_idx: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
        """Replaces a Mamba-2 layer's states."""
        layer = self.layers[layer_idx]
        if layer.has_previous_state[0] and torch.is_grad_enabled():  # autograd may have saved the old ones
            layer.conv_states[0], layer.recurrent_states[0] = conv_state, recurrent_state
        else:
            self.update_conv_state(conv_state, layer_idx)
            self.update_recurrent_state(recurrent_state, layer_idx)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept, by name: `layers.N.keys`, `.values`, `.conv_state`, `.recurrent_state`.

        And `image_places`, if there are any.
        """
        tensors = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LinearAttentionLayer):
                found = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
            elif layer.has_previous_state[0]:
                found = {"conv_state": layer.conv_states[0], "recurrent_state": layer.recurrent_states[0]}
            else:
                found = {}
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in found.items()}
        return tensors if self.image_places is None else tensors | {"image_places": self.image_places}

    def load_tensors(self, tensors: dict[str, Tensor], length: int) -> None:
        """Fills an empty cache.

        Args:
            tensors: As `tensors` gave them.
            length: Tokens that they have read.
        """
        for index in range(len(self.layers) if length else 0):
            if index in self.attention_layers:
                self.update(tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"], index)
            else:
                names = (f"layers.{index}.conv_state", f"layers.{index}.recurrent_state")
                self.update_states(index, *(tensors[name] for name in names))
        self._read = length
        if "image_places" in tensors:
            self.image_places = tensors["image_places"].bool()

    # --- copies ------------------------------------------------------------------------------------------------------

    def clone(self) -> "MmMambaCache":
        """A copy that shares nothing with this cache, without gradients."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, name, value.detach().clone())
                elif isinstance(value, dict):
                    tensors = {i: x.detach().clone() for i, x in value.items() if isinstance(x, Tensor)}
                    setattr(layer, name, value | tensors)
                elif name == "buffers":
                    layer.buffers = None
        return other

    def snapshot(self) -> "Snapshot":
        """What `restore` needs to forget all that is read from now on. Keys and values are not copied."""
        states = {i: (x.clone(), self.recurrent_state(i).clone()) for i, x in self._conv_states().items()}
        return Snapshot(self.get_seq_length(), states)

    @torch.no_grad()
    def restore(self, snapshot: "Snapshot") -> None:
        """Forgets what was read since the snapshot."""
        if snapshot.length == 0:
            return self.reset()
        for index, (conv_state, recurrent_state) in snapshot.states.items():
            self.conv_state(index).copy_(conv_state)
            self.recurrent_state(index).copy_(recurrent_state)
        self._crop_to(snapshot.length)

    def _conv_states(self) -> dict[int, Tensor]:
        found = {index: self.conv_state(index) for index in self.state_layers}
        return {index: state for index, state in found.items() if state is not None}

    # --- fixed length, for recorded steps ----------------------------------------------------------------------------

    @property
    def can_be_fixed(self) -> bool:
        """Whether `fixed_length` can hold this cache's keys and values."""
        if self.image_places is not None:
            return False
        return not self.offloading and all(isinstance(self.layers[i], DynamicLayer) for i in self.attention_layers)

    @contextmanager
    def fixed_length(self, capacity: int):
        """Holds keys and values in tensors of fixed length and place within the block.

        Args:
            capacity: Tokens.

        Yields:
            All tensors of the cache that a step changes: the states, and how far the keys and values are filled.
        """
        growing = {index: self.layers[index] for index in self.attention_layers}
        self._read = self.get_seq_length()
        try:
            for index, layer in growing.items():
                fixed = StaticLayer(max_cache_len=capacity)
                fixed.update(layer.keys, layer.values)
                self.layers[index] = fixed
                layer.keys = layer.values = layer.buffers = None  # so that they are in memory once
            states = [x for i, x in self._conv_states().items()] + [self.recurrent_state(i) for i in self.state_layers]
            yield states + [self.layers[index].cumulative_length for index in growing]
        finally:
            for index, layer in growing.items():
                fixed = self.layers[index]
                if fixed is not layer:
                    layer.buffers = (fixed.keys, fixed.values)
                    layer.keys, layer.values = (x[:, :, : self._read] for x in layer.buffers)
                    self.layers[index] = layer


def expected_shapes(config, length: int, image_places: Tensor | None = None) -> dict[str, list[int]]:
    """Shapes of `MmMambaCache.tensors` after so many tokens in one row.

    Args:
        config: The model's `text_config`.
        length: Tokens.
        image_places: See `MmMambaCache`; counts if its shape is (1, length).
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes, columns = {}, length
    if image_places is not None and list(image_places.shape) == [1, length]:
        shapes["image_places"], columns = [1, length], num_columns(image_places.bool())
    for index, kind in enumerate(config.layer_types if length else ()):
        if kind == "linear_attention":
            shapes[f"layers.{index}.conv_state"] = [1, (heads + 2 * kv_heads) * size, config.conv_kernel - 1]
            shapes[f"layers.{index}.recurrent_state"] = [1, heads, size, size]
        else:
            shape = [1, kv_heads, columns if index < config.num_embedding_layers else length, size]
            shapes |= {f"layers.{index}.{name}": shape for name in ("keys", "values")}
    return shapes


class Snapshot(NamedTuple):
    """See `MmMambaCache.snapshot`: tokens read, and copies of each Mamba-2 layer's two states."""

    length: int
    states: dict[int, tuple[Tensor, Tensor]]


def _new_layer(kind: str, max_cache_len: int | None = None, in_place: bool = True):
    if kind == "linear_attention":
        return LinearAttentionLayer()
    if max_cache_len is not None:
        return StaticLayer(max_cache_len=max_cache_len)
    return MmMambaKeyValueLayer() if in_place else DynamicLayer()  # offloading moves `keys` and `values` alone


def _writable(tensor: Tensor) -> bool:
    """Tensors made in inference mode cannot be changed outside of it."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()


def _own(states: dict[int, Tensor]) -> Tensor:
    """A layer's state, to be read or changed in place."""
    if not _writable(states[0]):
        states[0] = states[0].clone()
    return states[0]
