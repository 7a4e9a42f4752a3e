"""Products of a linear layer on a CPU by rows of input: torch's, and the CPU kernels'.

python -m mmmamba.benchmarks.products

The measured table behind `backends_mmmamba.FEW_ROWS` and `layer_step_mmmamba.MOST_ROWS`, for this processor.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from mmmamba.cpu_mmmamba import kernels, reason_without_kernels
from mmmamba.quantization_mmmamba import QuantizedLinear

from .timing import format_table, machine_info, time_in_turns


OUT, IN = 8192, 2048
COPIES = 8  # of a weight, so that none is in a cache when its turn comes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def candidates(rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, products of (rows, IN) with one weight after the other."""
    found = {}
    for name, dtype in DTYPES.items():
        x = torch.randn(rows, IN, dtype=dtype)
        weights = [torch.randn(OUT, IN, dtype=dtype) for _ in range(COPIES)]
        turns, more_turns = cycle(weights), cycle(weights)
        found[f"{name}, torch"] = lambda x=x, turns=turns: F.linear(x, next(turns))
        found[f"{name}, kernels"] = lambda x=x, turns=more_turns: kernels().multiply_dense(x, next(turns))
    x = torch.randn(rows, IN, dtype=torch.bfloat16)
    for bits in (8, 4):
        layers = [QuantizedLinear.from_linear(torch.nn.Linear(IN, OUT, bias=False), bits) for _ in range(COPIES)]
        turns = cycle(layers)
        found[f"{bits} bits, kernels"] = lambda x=x, turns=turns: next(turns)(x)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 4, 8, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=25, help="times that each candidate is timed")
    args = parser.parse_args()
    if (reason := reason_without_kernels()) is not None:
        raise SystemExit(f"error: there are no CPU kernels to measure: {reason}.")
    print({name: machine_info(torch.device("cpu"))[name] for name in ("date", "processor", "features", "threads")})
    table = []
    for rows in args.rows:
        timings = time_in_turns(candidates(rows), torch.device("cpu"), args.rounds, warmup=2)
        table.append({"rows": rows} | {name: 1e3 * timing.median for name, timing in timings.items()})
    print(f"milliseconds, {OUT} x {IN}, medians\n" + format_table(table, list(table[0])))


if __name__ == "__main__":
    main()
