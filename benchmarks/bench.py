"""`mmmamba bench`: speed and memory, every peer in the same run; prints a table, keeps JSON and a plot on request."""

import argparse
from importlib import import_module
from pathlib import Path

import torch

from mmmamba.env_cli import usable_device


NAMES = {
    "scan": "the scan: our backends, Transformers' PyTorch path, mamba_ssm",
    "decode": "one more token at growing context: linear, hybrid, teacher and peers of the same size",
    "prefill": "reading a prompt: the same models",
    "memory": "the most memory that reading a prompt takes: the same models",
    "distillation": "memory and time of the distillation stages, against straightforward implementations",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mmmamba bench`."""
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, summary in NAMES.items():
        kind = kinds.add_parser(name, help=summary)
        kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        kind.add_argument("--threads", type=int, help="processor threads (default: torch's choice)")
        kind.add_argument("--rounds", type=int, default=7, help="times that each candidate is timed")
        kind.add_argument("--results", type=Path, help="folder for JSON and plot (default: none is kept)")
        import_module(f"mmmamba.benchmarks.{name}").add_arguments(kind)


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba bench`. Raises ValueError for a device that is not there."""
    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    import_module(f"mmmamba.benchmarks.{args.bench}").run(args, device)
