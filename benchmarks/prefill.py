"""Reading a prompt, up to the logits of its last token.

mmmamba bench prefill --lengths 1024 4096 8192
mmmamba bench prefill --device cuda --size released --dtype bf16 --models linear hybrid teacher --lengths 8192 103000

Our models read in pieces and carry the state, as their `generate` does; peers read at once, as theirs does. FLOPs are
those that the maths needs; the share is of the rate of a matrix product measured on the same machine in the same run.
"""

import argparse

import torch

from .models import DTYPES, make_model, prefill_flops
from .plot import line_plot
from .timing import format_table, roofline_ceilings, time_in_turns, write_result


COLUMNS = ["length", "model", "seconds", "least", "most", "tokens/s", "GFLOP/s", "share", "roofline s"]


def run(args: argparse.Namespace, device: torch.device) -> None:
    ceilings = roofline_ceilings(device, DTYPES[args.dtype])
    models = {name: make_model(name, args, device) for name in args.models}
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch")}
    for length in args.lengths:
        ids = torch.randint(4, 1000, (args.batch, length), device=device)
        candidates = {name: lambda model=model, ids=ids: generate_one(model, ids) for name, model in models.items()}
        for name in list(candidates):
            try:
                candidates[name]()  # warms up
            except torch.OutOfMemoryError:
                rows.append({"length": length, "model": f"{name}: out of memory"})
                del candidates[name]
        for name, timing in time_in_turns(candidates, device, args.rounds, warmup=0).items():
            flops = prefill_flops(models[name], length, args.batch)
            rate = flops / timing.median
            rows.append(
                {
                    "length": length, "model": name,
                    "seconds": timing.median, "least": timing.least, "most": timing.most,
                    "tokens/s": args.batch * length / timing.median, "GFLOP/s": rate / 1e9,
                    "share": rate / ceilings["flops_per_second"],
                    "roofline s": flops / ceilings["flops_per_second"],
                }
            )  # fmt: skip
        result = {"settings": settings, "ceilings": ceilings, "rows": rows}
        file = write_result("prefill", device, result, args.results)
    print(f"matrix products {ceilings['flops_per_second'] / 1e9:,.0f} GFLOP/s, {args.dtype}, batch {args.batch}\n")
    print(format_table(rows, COLUMNS))
    if file is not None:
        line_plot(file.with_suffix(".png"), rows, "length", "seconds", "prompt (tokens)", "seconds", "roofline s")


@torch.no_grad()
def generate_one(model, ids: torch.Tensor) -> torch.Tensor:
    """Reads a prompt by `generate`, and generates one token."""
    options = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)
