"""Decoding without launch overhead: one step of a model, recorded once as a CUDA graph and replayed for every token.

Within a call of `generate` the first single step records. It fixes the length of keys and values to the longest answer
(the states of Mamba-2 layers never change their size); how much of them is filled lives on the device, so one
recording serves all steps. Recording costs two ordinary steps and what CUDA keeps of freed memory. Where it fails,
steps run as they do anywhere else, and a warning says why.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import Lock

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .backends_mmmamba import find
from .cache_mmmamba import CACHE, MmMambaCache


FEWEST_STEPS = 8  # an answer that is sure to be shorter is not worth a recording
_recording = Lock()


def recordable(model, cache: Cache | None) -> bool:
    """Whether steps of this model with this cache can be recorded: on one CUDA device, unquantised, unsharded."""
    if not hasattr(cache, "fixed_length") or model.device.type != "cuda" or torch.version.cuda is None:
        return False  # among others Transformers' own caches
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if cache.attention_layers and find("triton")[0] is None:  # it runs the attention of a recorded step
        return False
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return False
    return cache.can_be_fixed


def record(run: Callable[[], Tensor], undo: Callable[[], None], device: torch.device) -> tuple[Callable, Tensor]:
    """A function that repeats `run`, and the tensor that its result is written to.

    Args:
        run: Launches work on fixed tensors only.
        undo: Takes back what a run changed, in tensors and in what Python counts; called after each.
        device: Where the tensors are.
    """
    # Streams, graphs and kernels belong to the current device. Other threads may work on while this one records.
    with _recording, torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries and kernels set themselves up
            undo()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
        undo()
    return graph.replay, result


def attention_of_one_token(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    length: Tensor,
    **_,
) -> tuple[Tensor, None]:
    """An attention function in Transformers' form for one token and keys and values of fixed length.

    Args:
        query: (batch, heads, 1, head_dim).
        key, value: (batch, key/value heads, capacity, head_dim).
        attention_mask: (batch, 1, 1, capacity), bool; or None.
        length: (1,), int32: tokens there are, the one at hand included.
    """
    from .attention_mmmamba import attend

    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    return attend(query[:, :, 0].contiguous(), key, value, mask, length, scaling)[:, None], None


class RecordedStep:
    """One step of a model with one cache, for a batch that has been read, as a function of token ids.

    Args:
        model: With `lm_head`.
        cache: Which has read a prompt; its keys and values have a fixed length until `release`.
        attention_mask: (batch, length), 1 for what may be seen, the token to come included; None if that is all.
        rows: Of the batch.
        capacity: Tokens that keys and values have room for.
        position_ids: (batch or 1, 1), of the first step; counted over what may be seen if not given.
    """

    def __init__(
        self,
        model,
        cache: MmMambaCache,
        attention_mask: Tensor | None,
        rows: int,
        capacity: int,
        position_ids: Tensor | None = None,
    ):
        self.model, self.cache, self.capacity = model, cache, capacity
        device, self.read = model.device, cache.get_seq_length()
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        if position_ids is None:
            position_ids = torch.full((rows, 1), self.read, device=device)
            if attention_mask is not None:
                position_ids = attention_mask.long().sum(1, keepdim=True) - 1
        self.positions = position_ids[..., -1:].expand(rows, 1) - 1  # every step begins by counting on
        self.length = torch.full((1,), self.read, dtype=torch.int32, device=device)
        self.mask = None
        if cache.attention_layers and attention_mask is not None and not attention_mask.all():
            self.mask = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=device)
            self.mask[:, 0, 0, : attention_mask.shape[1]] = attention_mask.bool()
        with ExitStack() as stack:
            changing = [*stack.enter_context(cache.fixed_length(capacity)), self.positions, self.length]
            self.replay, self.logits = self._record(changing)
            self._fixed = stack.pop_all()

    def release(self) -> None:
        """Gives the cache back keys and values that grow, with what was read."""
        self._fixed.close()

    def _run(self) -> Tensor:
        self.positions.add_(1)
        self.length.add_(1)
        return self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask={"full_attention": self.mask, "linear_attention": None},
            use_cache=True,
            attention_function=partial(attention_of_one_token, length=self.length),
            **{CACHE: self.cache},
        ).logits

    def _record(self, changing: list[Tensor]) -> tuple[Callable, Tensor]:
        before = [tensor.clone() for tensor in changing]

        def undo():
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(old)
            self._count()

        try:
            return record(self._run, undo, self.model.device)
        except BaseException:
            undo()
            raise

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another token."""
        return self.read >= self.capacity

    def _count(self) -> None:
        """What runs on the device alone counts no tokens in the cache, so they are counted here."""
        self.cache.advance(self.read - self.cache.get_seq_length())

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Args: input_ids (batch, 1). Returns logits (batch, 1, vocabulary), overwritten by the next step."""
        self.ids.copy_(input_ids)
        self.replay()
        self.read += 1
        self._count()
        return self.logits
