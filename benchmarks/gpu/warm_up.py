"""First-answer latency: after warming up, on lengths that were never seen, and on one of them again."""

import argparse
import time

import torch

from mmmamba.benchmarks.models import add_arguments, make
from mmmamba.benchmarks.timing import table


# A length divisible by 16, an odd one, and one that is read in two pieces.
COLUMNS = {"1 s": 1, "777 s": 777, "4096 s": 4096, "9001 s": 9001, "9001 again s": 9001}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in ("linear", "hybrid"):
        model = make(name, args, device)
        row = {"model": name, "warm_up s": model.warm_up((1,))}
        for label, length in COLUMNS.items():
            ids = torch.zeros(1, length, dtype=torch.long, device=device)
            start = time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, eos_token_id=None, pad_token_id=0
            )
            row[label] = time.perf_counter() - start
        rows.append(row)
    print(table(rows, ["model", "warm_up s", *COLUMNS]))


if __name__ == "__main__":
    main()
