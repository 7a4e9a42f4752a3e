"""How many bytes per second this machine reads from memory at best, by loops of torch and of ours over a gibibyte.

python -m mmmamba.benchmarks.laptop.roofline --threads 2       # prints JSON: bytes per second by loop
"""

import argparse
import json
import sys
import time

import torch
from torch import Tensor, nn

from mmmamba.cpu_mmmamba import GROUP, TILE, bytes_per_block
from mmmamba.quantization_mmmamba import QuantizedLinear


REPEATED = 5


@torch.no_grad()
def read_rates(size: int) -> dict[str, float]:
    """The best of some repetitions over so many bytes, in bytes per second, by loop."""
    numbers = torch.ones(size // 4)
    rows, vector = numbers.view(-1, 2048), torch.ones(2048)
    quantized = {bits: _quantized(numbers, bits) for bits in (4, 8)}
    loops = {
        "sum, fp32": numbers.sum,
        "sum, int64": numbers.view(torch.int64).sum,
        "largest, int32": numbers.view(torch.int32).amax,
        "product with a vector, fp32": lambda: torch.mv(rows, vector),
        "product with itself, fp32": lambda: torch.dot(numbers, numbers),
        "product with a vector, 4 bits": lambda: quantized[4](vector[None]),
        "product with a vector, 8 bits": lambda: quantized[8](vector[None]),
    }
    rates = {}
    for name, loop in loops.items():
        seconds = []
        for _ in range(REPEATED):
            start = time.perf_counter()
            loop()
            seconds.append(time.perf_counter() - start)
        rates[name] = numbers.nbytes / min(seconds)
    return rates


def _quantized(numbers: Tensor, bits: int) -> QuantizedLinear:
    """A layer of 2,048 inputs whose weights are (nearly) all these bytes; what they stand for is of no account."""
    blocks, groups = bytes_per_block(bits), 2048 // GROUP
    tiles = numbers.nbytes // (blocks * groups)
    layer = QuantizedLinear(2048, TILE * tiles, bits, device="meta")
    weight = numbers.view(torch.uint8)[: tiles * groups * blocks].view(tiles, groups, blocks)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmmamba.benchmarks.laptop.roofline", description=__doc__)
    parser.add_argument("--threads", type=int, help="(default: torch's choice)")
    parser.add_argument("--bytes", type=int, default=2**30, help="more than caches hold (default: 2^30)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(read_rates(args.bytes)))


if __name__ == "__main__":
    main(sys.argv[1:])
