"""One more token at growing context.

mmmamba bench decode --lengths 1024 4096 16384 65536
mmmamba bench decode --device cuda --size released --dtype bf16 --lengths 1024 103000 --batch 1

Our models run eagerly with a cache that grows, as upstream's users run theirs, and on CUDA also recorded with a fixed
cache. Bytes are counted exactly; the share is of the read bandwidth measured on the same machine in the same run.
"""

import argparse

import torch

from .models import DTYPES, OURS, decode_work, make, read, stepper
from .models import add_arguments as add_models
from .plot import lines
from .timing import ceilings, in_turns, table, write


COLUMNS = ["context", "model", "way", "ms", "least ms", "most ms", "tokens/s", "GB/s", "share", "roofline ms"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--together", action="store_true", help="time all lengths in turns, to compare them")
    parser.add_argument("--steps", type=int, default=8, help="tokens in one timing")


def run(args: argparse.Namespace, device: torch.device) -> None:
    limits = ceilings(device, DTYPES[args.dtype])
    models = {name: make(name, args, device) for name in args.models}
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch", "steps")}
    for lengths in [args.lengths] if args.together else [[length] for length in args.lengths]:
        runs, work = {}, {}
        for length in lengths:
            for name, model in models.items():
                for way in ["eager", "recorded"] if device.type == "cuda" and name in OURS else ["eager"]:
                    try:
                        cache = read(model, length, args.batch)
                        work[length, name, way] = decode_work(model, cache, args.batch)
                        step = stepper(model, cache, args.batch, way == "recorded", (args.rounds + 1) * args.steps)
                        runs[length, name, way] = several(step, args.steps)
                    except torch.OutOfMemoryError:
                        rows.append({"context": length, "model": name, "way": f"{way}: out of memory"})
        for (length, name, way), found in in_turns(runs, device, args.rounds).items():
            seconds, bytes_ = found["median"] / args.steps, work[length, name, way].bytes
            rows.append(
                {
                    "context": length, "model": name, "way": way, "ms": 1e3 * seconds,
                    "least ms": 1e3 * found["least"] / args.steps, "most ms": 1e3 * found["most"] / args.steps,
                    "tokens/s": args.batch / seconds, "GB/s": bytes_ / seconds / 1e9,
                    "share": bytes_ / seconds / limits["bytes_per_second"],
                    "roofline ms": 1e3 * bytes_ / limits["bytes_per_second"],
                }
            )  # fmt: skip
        file = write("decode", device, {"settings": settings, "ceilings": limits, "rows": rows}, args.results)
    print(f"read bandwidth {limits['bytes_per_second'] / 1e9:.1f} GB/s, {args.dtype}, batch {args.batch}\n")
    print(table(rows, COLUMNS))
    if file is not None:
        lines(file.with_suffix(".png"), rows, "context", "ms", "context (tokens)", "ms per token", "roofline ms")


def several(step, steps: int):
    def run():
        for _ in range(steps):
            step()

    return run
