"""How many bytes per second this machine reads from memory at best, by several loops of torch over a gibibyte.

python -m mmmamba.benchmarks.laptop.roofline --threads 2       # prints JSON: bytes per second by loop
"""

import argparse
import json
import sys
import time

import torch


REPEATED = 5


def read_rates(size: int) -> dict[str, float]:
    """The best of some repetitions over so many bytes, in bytes per second, by loop."""
    numbers = torch.ones(size // 4)
    rows, vector = numbers.view(-1, 2048), torch.ones(2048)
    loops = {
        "sum, fp32": numbers.sum,
        "sum, int64": numbers.view(torch.int64).sum,
        "largest, int32": numbers.view(torch.int32).amax,
        "product with a vector, fp32": lambda: torch.mv(rows, vector),
        "product with itself, fp32": lambda: torch.dot(numbers, numbers),
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
