"""`mmmamba bench`: speed and memory beside peers in the same run, as a table and, if asked for, JSON and a plot."""

import argparse
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmmamba.benchmarks import arguments as benchmark_arguments
from mmmamba.cli import arguments


BENCHMARKS = {
    "scan": "the scan: our backends, Transformers' PyTorch path, mamba_ssm",
    "decode": "one more token at growing context: linear, hybrid, teacher and peers of the same size",
    "prefill": "reading a prompt: the same models",
    "memory": "peak memory of reading a prompt: the same models",
    "distillation": "memory and time of the distillation stages, beside naive implementations",
    "laptop": "what a CPU does with the released size, in bf16, 8 and 4 bits, beside llama.cpp",
    "serving": "requests per second and latency in vLLM: our plugin, Granite-4 and Llama of the same size",
    "capacity": "conversations that fit into the memory of a GPU, computed",
    "quantization": "answers and size on disk under every quantisation tool, before saving and after loading",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mmmamba bench`; those of a benchmark only if it is named."""
    benchmarks = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, summary in BENCHMARKS.items():
        benchmarks.add_parser(name, help=summary, declare=partial(_add_benchmark_arguments, name))


def _add_benchmark_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    arguments.device(parser)
    parser.add_argument("--threads", type=arguments.positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=arguments.positive, default=7, help="times that each candidate is timed")
    parser.add_argument("--results", type=Path, help="folder for JSON and plot (default: neither is written)")
    getattr(benchmark_arguments, name)(parser)


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba bench`. Raises ValueError for a device that is not available, or plots that cannot be drawn."""
    if args.results is not None and find_spec("matplotlib") is None:
        raise ValueError("--results draws a plot, and matplotlib is not installed; run `pip install matplotlib`.")
    import torch

    from mmmamba.cli.env import usable_device

    device = usable_device(args.device)
    args.device = str(device)  # for the processes that a benchmark starts
    if args.threads:
        torch.set_num_threads(args.threads)
    import_module(f"mmmamba.benchmarks.{args.bench}").run(args, device)
