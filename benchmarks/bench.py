"""`mmmamba bench`: speed and memory, every peer in the same run; prints a table, keeps JSON and a plot on request."""

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path

from mmmamba.cli import arguments


NAMES = {
    "scan": "the scan: our backends, Transformers' PyTorch path, mamba_ssm",
    "decode": "one more token at growing context: linear, hybrid, teacher and peers of the same size",
    "prefill": "reading a prompt: the same models",
    "memory": "the most memory that reading a prompt takes: the same models",
    "distillation": "memory and time of the distillation stages, against straightforward implementations",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mmmamba bench`, and of a benchmark, whose import is slow, only if it is named."""
    benchmarks = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, summary in NAMES.items():
        benchmarks.add_parser(name, help=summary, declare=partial(_add_arguments_of, name))


def _add_arguments_of(name: str, parser: argparse.ArgumentParser) -> None:
    arguments.device(parser)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each candidate is timed")
    parser.add_argument("--results", type=Path, help="folder for JSON and plot (default: none is kept)")
    import_module(f"mmmamba.benchmarks.{name}").add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba bench`. Raises ValueError for a device that is not there."""
    import torch

    from mmmamba.cli.env import usable_device

    device = usable_device(args.device)
    args.device = str(device)  # for the processes that a benchmark starts
    if args.threads:
        torch.set_num_threads(args.threads)
    import_module(f"mmmamba.benchmarks.{args.bench}").run(args, device)
