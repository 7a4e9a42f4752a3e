"""Latency of the first token after `warm_up`, for prompts of lengths not seen before and of one length twice."""

import argparse

import torch

from mmmamba.benchmarks import arguments
from mmmamba.benchmarks.models import make_model
from mmmamba.benchmarks.prefill import generate_one
from mmmamba.benchmarks.timing import format_table, time_once


# Prompt lengths by column: Triton specialises kernels for 1 and multiples of 16, and 9001 is read in two pieces.
LENGTHS = {"1 s": 1, "777 s": 777, "4096 s": 4096, "9001 s": 9001, "9001 again s": 9001}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    arguments.models(parser)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in ("linear", "hybrid"):
        model = make_model(name, args, device)
        row = {"model": name, "warm_up s": model.warm_up((1,))}
        for column, length in LENGTHS.items():
            ids = torch.zeros(1, length, dtype=torch.long, device=device)
            row[column] = time_once(lambda ids=ids, model=model: generate_one(model, ids), device)
        rows.append(row)
    print(format_table(rows, ["model", "warm_up s", *LENGTHS]))


if __name__ == "__main__":
    main()
