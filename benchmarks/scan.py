"""The scan alone: our backends, Transformers' own PyTorch path (Bamba's), mamba_ssm's kernels where they run.

mmmamba bench scan                                  # the released model's heads, forward
mmmamba bench scan --length 4096 --heads 16 --kv-heads 16 --backward

Peers without grouped keys and values get them repeated for every query head; repeating is not timed.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from mmmamba.backends_mmmamba import find, unavailable_reason

from .models import DTYPES
from .plot import bar_plot
from .timing import format_table, time_in_turns, time_once, write_result


COLUMNS = ["dtype", "scan", "ms", "least ms", "most ms", "times faster", "error", "peak MiB"]


def scan_inputs(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """v, k, q in `dtype`, (batch, length, heads, head_dim); dt and A in fp32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(args.batch, args.length, *shape, generator=generator).to(device)

    v, k = (draw(args.kv_heads, args.head_dim).to(dtype) for _ in range(2))
    q = (draw(args.heads, args.head_dim) / args.head_dim**0.5).to(dtype)
    return [v, k, q, F.softplus(draw(args.heads) - 3), -torch.ones(args.heads, device=device)]


def use_source(folder: Path) -> None:
    """Makes mamba_ssm's Triton kernels importable from its source: its packages import CUDA extensions.

    Raises:
        ValueError: if they are not there.
    """
    if not (folder / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py").is_file():
        raise ValueError(f"--mamba-ssm {folder} is not mamba_ssm's source; give the folder that holds mamba_ssm/ops.")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        sys.modules[name] = module_from_spec(ModuleSpec(name, None, is_package=True))
        sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]


def candidates(
    tensors: list[torch.Tensor], repeated: list[torch.Tensor], mamba_ssm: Path | None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that scan the same inputs and return y; `repeated` are v and k, repeated for every query head."""
    (v, k, q, dt, A), functions = tensors, {}
    for name in ("torch", "triton"):
        if unavailable_reason(name, v.device.type, v.dtype) is None:
            functions[name] = lambda ops=find(name)[0]: ops.ssd_scan(v, k, q, dt, A, None)[0]  # noqa: B008
    from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan

    # Where mamba_ssm is installed, Transformers' decorator puts its kernel in place: undecorated is the PyTorch path.
    peers = {"transformers": getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)}
    if mamba_ssm is not None:
        if v.device.type != "cuda":
            raise ValueError(f"mamba_ssm's kernels run on CUDA devices, not {v.device}; leave --mamba-ssm out.")
        use_source(mamba_ssm)
    if mamba_ssm is not None or unavailable_reason("cuda", v.device.type, v.dtype) is None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        peers["mamba_ssm"] = mamba_chunk_scan_combined
    for name, scan in peers.items():
        for chunk in (128, 256) if name == "transformers" else (256,):  # mamba_ssm autotunes each for a minute
            label = f"{name}, chunks of {chunk}"
            functions[label] = lambda scan=scan, chunk=chunk: scan(repeated[0], dt, A, repeated[1], q, chunk)
    return functions


def relative_errors(functions: dict, tensors: list[torch.Tensor]) -> dict[str, float]:
    """Of every y, against the reference in fp64."""
    truth = find("torch")[0].ssd_scan(*(x.double() for x in tensors), None)[0]
    return {name: float((function().double() - truth).norm() / truth.norm()) for name, function in functions.items()}


def peak_mib(function, device: torch.device) -> float | None:
    """Peak memory of a call above what was in use before, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    time_once(function, device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def run(args: argparse.Namespace, device: torch.device) -> None:
    rows = []
    for dtype in args.dtypes:
        tensors = scan_inputs(args, DTYPES[dtype], device)
        repeated = [x.repeat_interleave(args.heads // args.kv_heads, 2) for x in tensors[:2]]
        functions = candidates(tensors, repeated, args.mamba_ssm)
        errors = relative_errors(functions, tensors)
        if args.backward:
            for tensor in [*tensors, *repeated]:
                tensor.requires_grad_()
            functions = {name: lambda scan=scan: scan().sum().backward() for name, scan in functions.items()}
        with torch.set_grad_enabled(args.backward):
            timings = time_in_turns(functions, device, args.rounds)
            peaks = {name: peak_mib(function, device) for name, function in functions.items()}
        best_peer = min(timing.median for name, timing in timings.items() if name.startswith("transformers"))
        for name, timing in timings.items():
            rows.append(
                {
                    "dtype": dtype, "scan": name,
                    "ms": 1e3 * timing.median, "least ms": 1e3 * timing.least, "most ms": 1e3 * timing.most,
                    "times faster": best_peer / timing.median, "error": errors[name], "peak MiB": peaks[name],
                }
            )  # fmt: skip
    print(format_table(rows, COLUMNS))
    shape = {name: getattr(args, name) for name in ("batch", "length", "heads", "kv_heads", "head_dim", "backward")}
    name = "scan-backward" if args.backward else "scan"
    file = write_result(name, device, {"shape": shape, "rows": rows}, args.results)
    if file is not None:
        panels = {dtype: {} for dtype in args.dtypes}
        for row in rows:
            panels[row["dtype"]][row["scan"]] = row["ms"], row["least ms"], row["most ms"]
        bar_plot(file.with_suffix(".png"), panels, "ms")
