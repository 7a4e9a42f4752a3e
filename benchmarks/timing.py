"""How things are timed here: candidates in turns, medians with their spread, ceilings measured on the same machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict:
    """What a figure was measured on and with."""
    packages = {}
    for name in ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d", "flash-attn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    found = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(
    candidates: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Times every candidate once per round, each round in another order.

    Returns:
        For each candidate the median, least and largest of its seconds.
    """
    names, seconds = list(candidates), {name: [] for name in candidates}
    for _ in range(warm_up):
        for name in names:
            once(candidates[name], device)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(once(candidates[name], device))
    return {name: spread(found) for name, found in seconds.items()}


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do: bytes read in a second by a reduction, and FLOPs in a second of a matrix product."""
    on_gpu = device.type == "cuda"
    weights = torch.ones(2**31 if on_gpu else 2**28, dtype=torch.uint8, device=device).view(torch.float32)
    rounds = 20 if on_gpu else 7
    read = in_turns({"read": weights.sum}, device, rounds)["read"]["least"]
    rates = []
    for size in (4096, 8192) if on_gpu else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * size**3 / in_turns({"product": lambda a=a, b=b: a @ b}, device, rounds)["product"]["least"])
    return {"bytes_per_second": weights.nbytes / read, "flops_per_second": max(rates)}


def write(name: str, device: torch.device, result: dict, folder: Path | None) -> Path | None:
    """Writes a result with its machine as JSON; returns the file."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{device.type}.json"
    file.write_text(json.dumps({"machine": machine(device)} | result, indent=2) + "\n", encoding="utf-8")
    return file


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as text; numbers with four digits."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return "" if value is None else str(value)

    cells = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
