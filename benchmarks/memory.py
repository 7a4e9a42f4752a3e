"""The most memory that reading a prompt takes above the weights, and what is kept of it.

mmmamba bench memory --models linear hybrid llama --lengths 8192 32768 131072
mmmamba bench memory --models linear --layers 2 --lengths 1048576       # a million tokens, then an answer

Every measurement is a process of its own; the medians of some are given.
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

from .models import add_arguments as add_models
from .models import bytes_of_cache, make
from .plot import lines
from .timing import table, write


# Freed memory goes back at once: what the C library keeps for later depends on chance more than on length.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
COLUMNS = ["length", "model", "peak MiB", "least MiB", "most MiB", "kept MiB", "seconds", "tokens/s"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.set_defaults(rounds=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, device: torch.device) -> None:
    if args.one:
        print(json.dumps(measure(args, device)))
        return
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch")}
    for length in args.lengths:
        for name in args.models:
            command = ["memory", "--one", f"--device={args.device}", f"--threads={torch.get_num_threads()}"]
            command += [f"--models={name}", f"--lengths={length}", f"--size={args.size}", f"--dtype={args.dtype}"]
            command += [f"--batch={args.batch}"] + ([f"--layers={args.layers}"] if args.layers else [])
            try:
                runs = [in_a_process(command, **AT_ONCE) for _ in range(args.rounds)]
                found = {column: statistics.median(run[column] for run in runs) for column in runs[0]}
                peaks = [run["peak MiB"] for run in runs]
                found |= {"least MiB": min(peaks), "most MiB": max(peaks)}
            except ChildProcessError as error:
                found = {"failed": str(error)}
            rows.append({"length": length, "model": name} | found)
        file = write("memory", device, {"settings": settings, "rows": rows}, args.results)
    print(table(rows, [*COLUMNS, "failed"] if any("failed" in row for row in rows) else COLUMNS))
    if file is not None:
        lines(file.with_suffix(".png"), rows, "length", "peak MiB", "prompt (tokens)", "MiB above weights", "kept MiB")


def in_a_process(command: list[str], **environment: str) -> dict:
    """What `mmmamba bench` with these arguments prints last, as JSON. Raises ChildProcessError with its last words."""
    command = [sys.executable, "-m", "mmmamba", "bench", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise ChildProcessError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Reads one prompt and answers eight tokens."""
    (name,), (length,) = args.models, args.lengths
    model = make(name, args, device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}

    def answer(tokens: int):
        ids = torch.randint(4, 1000, (args.batch, tokens), device=device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)

    answer(64)  # what libraries set up for themselves is no cost of length
    before = now(device, reset=True)
    start = time.perf_counter()
    output = answer(length)
    seconds = time.perf_counter() - start
    peak = most(device) - before
    kept = sum(bytes_of_cache(output[CACHE]))
    return {"peak MiB": peak / 2**20, "kept MiB": kept / 2**20, "seconds": seconds, "tokens/s": length / seconds}


def now(device: torch.device, reset: bool = False) -> int:
    """Bytes in use; `reset` begins to look for the most from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def most(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """A size in bytes from this process's status, which Linux keeps."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])
