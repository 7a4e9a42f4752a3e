"""Peak memory above the weights while a prompt is read and answered, and the size of the cache afterwards.

mmmamba bench memory --models linear hybrid llama --lengths 8192 32768 131072
mmmamba bench memory --models linear --layers 2 --lengths 1048576       # a million tokens, then an answer

Every measurement runs in a process of its own; medians over `--rounds` of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmmamba.cache_mmmamba import CACHE

from .models import cache_bytes, make_model
from .plot import line_plot
from .timing import format_table, write_result


# glibc returns freed memory to the system at once: what it would hold back depends on chance more than on length.
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
COLUMNS = ["length", "model", "peak MiB", "least MiB", "most MiB", "cache MiB", "seconds", "tokens/s"]


def run(args: argparse.Namespace, device: torch.device) -> None:
    if args.measure_here:
        print(json.dumps(measure(args, device)))
        return
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch")}
    for length in args.lengths:
        for name in args.models:
            command = ["memory", "--measure-here", f"--device={args.device}", f"--threads={torch.get_num_threads()}"]
            command += [f"--models={name}", f"--lengths={length}", f"--size={args.size}", f"--dtype={args.dtype}"]
            command += [f"--batch={args.batch}"] + ([f"--layers={args.layers}"] if args.layers else [])
            try:
                runs = [bench_in_subprocess(command, **MALLOC_SETTINGS) for _ in range(args.rounds)]
                columns = {column: statistics.median(run[column] for run in runs) for column in runs[0]}
                peaks = [run["peak MiB"] for run in runs]
                columns |= {"least MiB": min(peaks), "most MiB": max(peaks)}
            except ChildProcessError as error:
                columns = {"failed": str(error)}
            rows.append({"length": length, "model": name} | columns)
        file = write_result("memory", device, {"settings": settings, "rows": rows}, args.results)
    print(format_table(rows, [*COLUMNS, "failed"] if any("failed" in row for row in rows) else COLUMNS))
    if file is not None:
        file = file.with_suffix(".png")
        line_plot(file, rows, "length", "peak MiB", "prompt (tokens)", "MiB above weights", dashed="cache MiB")


def bench_in_subprocess(arguments: list[str], **environment: str) -> dict:
    """Runs `mmmamba bench` and returns the JSON that it prints last.

    Raises:
        ChildProcessError: if it fails, with the last line of its errors.
    """
    command = [sys.executable, "-m", "mmmamba", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise ChildProcessError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Reads one prompt and generates eight tokens."""
    (name,), (length,) = args.models, args.lengths
    model = make_model(name, args, device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}

    def generate(prompt_length: int):
        ids = torch.randint(4, 1000, (args.batch, prompt_length), device=device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)

    generate(64)  # libraries allocate once for themselves, whatever the length
    before = reset_peak_memory(device)
    start = time.perf_counter()
    output = generate(length)
    seconds = time.perf_counter() - start
    peak = peak_memory(device) - before
    cache = sum(cache_bytes(output[CACHE]))
    return {"peak MiB": peak / 2**20, "cache MiB": cache / 2**20, "seconds": seconds, "tokens/s": length / seconds}


def reset_peak_memory(device: torch.device) -> int:
    """Restarts the measurement of the peak; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return process_status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_status("VmHWM")


def process_status(field: str) -> int:
    """A size in bytes from Linux's /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])
