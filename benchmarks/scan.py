"""The scan alone: our backends, Transformers' own PyTorch path (Bamba's), mamba_ssm's kernels where they run.

mmmamba bench scan                                  # the released model's heads, forward
mmmamba bench scan --length 4096 --heads 16 --kv-heads 16 --backward

Peers that know no grouped keys and values get them repeated; repeating is not timed.
"""

import argparse

import torch
import torch.nn.functional as F

from mmmamba.backends_mmmamba import find, unavailable_reason

from .plot import bars
from .timing import in_turns, once, table, write


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")


def inputs(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(args.batch, args.length, *shape, generator=generator).to(device)

    v, k = (draw(args.kv_heads, args.head_dim).to(dtype) for _ in range(2))
    q = (draw(args.heads, args.head_dim) / args.head_dim**0.5).to(dtype)
    return [v, k, q, F.softplus(draw(args.heads) - 3), -torch.ones(args.heads, device=device)]


def candidates(args: argparse.Namespace, tensors: list[torch.Tensor], wide: list[torch.Tensor]) -> dict:
    """Functions that scan the same inputs, returning y; `wide` are values and keys repeated for every query head."""
    (v, k, q, dt, A), found = tensors, {}
    for name in ("torch", "triton"):
        if unavailable_reason(name, v.device.type, v.dtype) is None:
            found[name] = lambda ops=find(name)[0]: ops.ssd_scan(v, k, q, dt, A, None)[0]  # noqa: B008
    from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan

    # Where mamba_ssm is installed the decorated function would be its kernel: the body is the PyTorch path.
    peers = {"transformers": getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)}
    if unavailable_reason("cuda", v.device.type, v.dtype) is None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        peers["mamba_ssm"] = mamba_chunk_scan_combined
    for name, scan in peers.items():
        for chunk in (128, 256):
            run = lambda scan=scan, chunk=chunk: scan(wide[0], dt, A, wide[1], q, chunk)  # noqa: E731
            found[f"{name}, chunks of {chunk}"] = run
    return found


def errors(runs: dict, tensors: list[torch.Tensor]) -> dict[str, float]:
    """Relative distance of every y from the reference in fp64."""
    truth = find("torch")[0].ssd_scan(*(x.double() for x in tensors), None)[0]
    return {name: float((run().double() - truth).norm() / truth.norm()) for name, run in runs.items()}


def peak(run, device: torch.device) -> float | None:
    """Most memory that a call takes beyond what is there, in MiB; on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    once(run, device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def run(args: argparse.Namespace, device: torch.device) -> None:
    rows = []
    for name in args.dtypes:
        tensors = inputs(args, DTYPES[name], device)
        wide = [x.repeat_interleave(args.heads // args.kv_heads, 2) for x in tensors[:2]]
        runs = candidates(args, tensors, wide)
        wrong = errors(runs, tensors)
        if args.backward:
            for tensor in [*tensors, *wide]:
                tensor.requires_grad_()
            runs = {label: lambda one=one: one().sum().backward() for label, one in runs.items()}
            timed = in_turns(runs, device, args.rounds)
        else:
            with torch.no_grad():
                timed = in_turns(runs, device, args.rounds)
        peers = [found["median"] for label, found in timed.items() if label.startswith("transformers")]
        for label, found in timed.items():
            rows.append(
                {"dtype": name, "scan": label, "ms": 1e3 * found["median"], "least ms": 1e3 * found["least"]}
                | {"most ms": 1e3 * found["most"], "times faster": min(peers) / found["median"]}
                | {"error": wrong[label], "peak MiB": peak(runs[label], device)}
            )
    print(table(rows, ["dtype", "scan", "ms", "least ms", "most ms", "times faster", "error", "peak MiB"]))
    shape = {name: getattr(args, name) for name in ("batch", "length", "heads", "kv_heads", "head_dim", "backward")}
    name = "scan-backward" if args.backward else "scan"
    file = write(name, device, {"shape": shape, "rows": rows}, args.results)
    if file is not None:
        groups = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in args.dtypes}
        spread = {
            dtype: {row["scan"]: (row["ms"], row["least ms"], row["most ms"]) for row in of_dtype}
            for dtype, of_dtype in groups.items()
        }
        bars(file.with_suffix(".png"), spread, "ms")
