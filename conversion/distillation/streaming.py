"""A loss computed piece by piece, so that only one piece's activations are alive at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, *tensors):
        # Parameters are leaves already; anything else is cut from its graph, into which backward returns its gradient.
        leaves = [tensor if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            loss = compute(*leaves)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return None, *(gradient * upstream for gradient in ctx.saved_tensors)


def streamed(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`compute(*tensors)`, whose gradients are computed at once and whose activations are then let go.

    The result takes part in autograd as usual, so that a sum of pieces can be differentiated by whatever drives the
    training (gradient accumulation, DDP, FSDP), while memory holds one piece's activations.

    Args:
        compute: Returns a scalar. Depends on nothing but `tensors` that needs a gradient.
        tensors: Each requires a gradient.
    """
    return _Streamed.apply(compute, *tensors) if torch.is_grad_enabled() else compute(*tensors)
