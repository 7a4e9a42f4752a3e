"""One more token at growing context.

mmmamba bench decode --lengths 1024 4096 16384 65536
mmmamba bench decode --device cuda --size released --dtype bf16 --lengths 1024 103000 --batch 1

Our models run eagerly with a cache that grows, as upstream's users run theirs, and on CUDA also as a recorded CUDA
graph with a cache of fixed length. Bytes moved are counted exactly; the share is of the read bandwidth measured on the
same machine in the same run.
"""

import argparse

import torch

from .arguments import OURS
from .models import DTYPES, cache_of_length, decode_bytes, decode_step, make_model
from .plot import line_plot
from .timing import format_table, roofline_ceilings, time_in_turns, write_result


COLUMNS = ["context", "model", "way", "ms", "least ms", "most ms", "tokens/s", "GB/s", "share", "roofline ms"]


def run(args: argparse.Namespace, device: torch.device) -> None:
    ceilings = roofline_ceilings(device, DTYPES[args.dtype])
    models = {name: make_model(name, args, device) for name in args.models}
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch", "steps")}
    for lengths in [args.lengths] if args.together else [[length] for length in args.lengths]:
        candidates, bytes_moved = {}, {}
        for length in lengths:
            for name, model in models.items():
                for way in ["eager", "recorded"] if device.type == "cuda" and name in OURS else ["eager"]:
                    try:
                        cache = cache_of_length(model, length, args.batch)
                        bytes_moved[length, name, way] = decode_bytes(model, cache, args.batch)
                        max_steps = (args.rounds + 1) * args.steps  # with those of the warm-up
                        step = decode_step(model, cache, args.batch, way == "recorded", max_steps)
                        candidates[length, name, way] = lambda step=step: [step() for _ in range(args.steps)]
                    except torch.OutOfMemoryError:
                        rows.append({"context": length, "model": name, "way": f"{way}: out of memory"})
        for (length, name, way), timing in time_in_turns(candidates, device, args.rounds).items():
            seconds, least, most = (value / args.steps for value in timing)
            bandwidth = bytes_moved[length, name, way] / seconds
            rows.append(
                {
                    "context": length, "model": name, "way": way,
                    "ms": 1e3 * seconds, "least ms": 1e3 * least, "most ms": 1e3 * most,
                    "tokens/s": args.batch / seconds, "GB/s": bandwidth / 1e9,
                    "share": bandwidth / ceilings["bytes_per_second"],
                    "roofline ms": 1e3 * bytes_moved[length, name, way] / ceilings["bytes_per_second"],
                }
            )  # fmt: skip
        result = {"settings": settings, "ceilings": ceilings, "rows": rows}
        file = write_result("decode", device, result, args.results)
    print(f"read bandwidth {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, {args.dtype}, batch {args.batch}\n")
    print(format_table(rows, COLUMNS))
    if file is not None:
        line_plot(file.with_suffix(".png"), rows, "context", "ms", "context (tokens)", "ms per token", "roofline ms")
