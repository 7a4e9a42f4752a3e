"""The arguments of each benchmark, declared without importing torch so that `--help` answers at once."""

import argparse
from pathlib import Path

from mmmamba.cli.arguments import HYBRID, positive


OURS = ("linear", "hybrid", "teacher")
PEERS = ("llama", "bamba", "falcon-h1")
SERVED = ("linear", "hybrid", "teacher", "granite", "llama")
LAPTOP_OURS, LAPTOP_PEERS = ("linear", "hybrid"), ("llama", "granite")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
SIZES = {  # layers, hidden, MLP, heads, key/value heads, vocabulary
    "tiny": (2, 64, 256, 2, 1, 1024),
    "narrow": (4, 128, 512, 2, 1, 8192),
    "small": (8, 512, 2048, 8, 4, 8192),
    "released": (32, 2048, 8192, 16, 8, 92553),
}


TOOLS = (  # of quantisation
    "none",
    "mmmamba, 8 bits",
    "mmmamba, 4 bits",
    "bitsandbytes int8",
    "bitsandbytes nf4",
    "bitsandbytes nf4, double",
    "bitsandbytes fp4",
    "torchao int8",
    "torchao int4",
    "torchao intx, 4 bits",
    "quanto int8",
)


def models(parser: argparse.ArgumentParser) -> None:
    """Which models are made; shared by the benchmarks that make some."""
    parser.add_argument("--models", nargs="+", choices=OURS + PEERS, default=[*OURS, *PEERS])
    parser.add_argument("--size", choices=list(SIZES), default="small", help="small, or the released model's")
    parser.add_argument("--layers", type=positive, help="fewer layers than the size has")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32")
    parser.add_argument("--batch", type=positive, default=1)


def scan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=positive, default=4096)
    parser.add_argument("--heads", type=positive, default=16)
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, default=["fp32", "bf16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--mamba-ssm", type=Path, metavar="DIR", help="source of mamba_ssm, if it is not installed")


def decode(parser: argparse.ArgumentParser) -> None:
    models(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--together", action="store_true", help="time all lengths in turns, to compare them")
    parser.add_argument("--steps", type=positive, default=8, help="tokens in one timing")


def prefill(parser: argparse.ArgumentParser) -> None:
    models(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096])


def memory(parser: argparse.ArgumentParser) -> None:
    models(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 32768])
    parser.set_defaults(rounds=3)
    parser.add_argument("--measure-here", action="store_true", help=argparse.SUPPRESS)  # set for the subprocesses


def distillation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--vocabulary", type=positive, default=32_000)
    parser.add_argument("--length", type=positive, default=1024, help="tokens of the one conversation in a step")
    parser.add_argument("--steps", type=positive, default=3, help="steps that each process times")
    parser.set_defaults(rounds=3)
    # Set for the subprocesses.
    parser.add_argument("--measure-here", nargs=2, metavar=("STAGE", "IMPLEMENTATION"), help=argparse.SUPPRESS)


def quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=HYBRID, help="model folder of the picture world")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--questions", type=positive, default=500)


def serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=SERVED, default=list(SERVED))
    parser.add_argument("--size", choices=list(SIZES), default="narrow", help="width, or the released model's")
    parser.add_argument("--layers", type=positive, help="another number of layers than the size has")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 64], help="requests in flight")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 16384], help="tokens of a prompt")
    parser.add_argument("--output-tokens", type=positive, default=64, help="tokens of every answer")
    parser.add_argument("--requests", type=positive, default=2, help="requests of a point, at least one per client")
    parser.add_argument("--batched-tokens", type=positive, default=2048, help="most tokens of one step of the engine")
    parser.add_argument("--cache-gib", type=float, help="memory for keys, values and states (default: enough for all)")
    parser.add_argument("--in-process", action="store_true", help="the engine alone, by processor time")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models that support it")
    parser.add_argument(
        "--logs", type=Path, help="folder for model folders and the servers' logs (default: temporary)"
    )
    parser.set_defaults(rounds=3)


def capacity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=list(SIZES), default="released")
    parser.add_argument("--layers", type=positive, help="another number of layers than the size has")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="memory of the GPU, 10^9 bytes")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 16384, 131072])


def laptop(parser: argparse.ArgumentParser) -> None:
    everything = [*LAPTOP_OURS, *LAPTOP_PEERS]
    bits = {"type": int, "nargs": "+", "choices": (4, 8, 16)}
    parser.add_argument("--models", nargs="+", choices=everything, default=everything)
    parser.add_argument("--bits", **bits, default=[4, 8, 16], help="of the weights (default: 4 8 16)")
    parser.add_argument(
        "--contexts", type=positive, nargs="+", default=[256, 4096, 32768], help="tokens before a step"
    )
    long = "of contexts above 16,384 tokens, which llama.cpp takes long to read"
    parser.add_argument("--long-bits", **bits, default=[4], help=f"{long} (default: 4)")
    parser.add_argument("--long-rounds", type=positive, default=1, help=f"{long} (default: 1)")
    parser.add_argument("--keep-peers", action="store_true", help="take llama.cpp's figures of the last run")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("~/.cache/mmmamba/laptop"),
        help="folder for llama.cpp, models and measurements (default: ~/.cache/mmmamba/laptop)",
    )
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="your own, instead of building one")
    parser.add_argument(
        "--normal-priority", action="store_true", help="do not put measurements before all else by chrt, as root may"
    )
    parser.add_argument("--size", choices=("small", "released"), default="released", help="small tries it out")
    parser.set_defaults(device="cpu", rounds=3)
