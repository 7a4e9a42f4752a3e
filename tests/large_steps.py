"""Step sizes over nine orders of magnitude, and the scan's exact results and gradients for them.

Everything is positive, so that no sum cancels and the relative error of every single element counts: a large step must
not take the digits of the small ones around it.
"""

import torch


LARGE = {  # which of so many steps are large, and how large
    "one of 1e4": lambda length, draw: torch.where(torch.arange(length) == 40, 1e4, draw),
    "one of 1e6": lambda length, draw: torch.where(torch.arange(length) == 40, 1e6, draw),
    "every seventh, to 1e6": lambda length, draw: torch.where(torch.arange(length) % 7 == 3, 1e7 * draw, draw),
    "half, to 1e6": lambda length, draw: torch.where(torch.rand(length) < 0.5, 1e7 * draw, draw),
    "the first half, to 1e6": lambda length, draw: torch.where(torch.arange(length) < length // 2, 1e7 * draw, draw),
}


def scan_inputs(large: str, length: int = 150, heads: int = 2, size: int = 5) -> list[torch.Tensor]:
    """v, k, q, dt, A and state of one row, one key/value head; in fp32."""
    torch.manual_seed(0)
    v, k, q = (torch.rand(1, length, n, size) + 0.5 for n in (1, 1, heads))
    small = 10 ** (2 * torch.rand(length) - 3)  # 1e-3 to 1e-1
    dt = LARGE[large](length, small)[None, :, None].expand(-1, -1, heads).contiguous()
    return [v, k, q, dt, -torch.tensor([1.0, 0.03])[:heads], torch.rand(1, heads, size, size) + 0.5]


def exact(inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y, the last state and every gradient, by the recurrence in fp64 step by step; and what errors are relative to.

    That is the value itself, but for dt, whose gradient is a difference: as the weight of a write, and in the decay.
    """
    v, k, q, dt, A, state = (x.double().requires_grad_() for x in inputs)
    dt_in_decay = dt.detach().clone().requires_grad_()
    S, ys = state, []
    for t in range(dt.shape[1]):
        write = (dt[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None, :]  # one key/value head for all
        S = (A * dt_in_decay[:, t]).exp()[..., None, None] * S + write
        ys.append((S @ q[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(ys, 1)
    leaves = [v, k, q, dt, A, state, dt_in_decay]
    *gradients, in_decay = torch.autograd.grad([y, S], leaves, [x.double() for x in upstream])
    scales = [y, S, *gradients]
    scales = [x.detach() for x in scales]
    values = list(scales)
    values[5], scales[5] = gradients[3] + in_decay, gradients[3].abs() + in_decay.abs()
    return values, scales


def largest_errors(scan, large: str, device: str = "cpu") -> dict[str, float]:
    """Of `scan(v, k, q, dt, A, state)` in fp32, for every output and gradient."""
    inputs = scan_inputs(large)
    upstream = [torch.rand(1, 150, 2, 5) + 0.5, torch.rand(1, 2, 5, 5) + 0.5]
    leaves = [x.to(device).requires_grad_() for x in inputs]
    outputs = scan(*leaves)
    found = [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, [x.to(device) for x in upstream])]
    names = ["y", "last state", "dv", "dk", "dq", "ddt", "dA", "dstate"]
    return {
        # Below 1e-30 fp32 itself runs out of digits.
        name: float(((value.cpu().double() - truth).abs() / (scale.abs() + 1e-30)).max())
        for name, value, truth, scale in zip(names, found, *exact(inputs, upstream), strict=True)
    }
