"""Reading a prompt, up to the logits of its last token.

mmmamba bench prefill --lengths 1024 4096 8192
mmmamba bench prefill --device cuda --size released --dtype bf16 --models linear hybrid teacher --lengths 8192 103000

Ours read in pieces with the state carried, as `generate` does; peers read at once, as theirs does. FLOPs are those
that the maths needs; the share is of the rate of a matrix product measured on the same machine in the same run.
"""

import argparse

import torch

from .models import DTYPES, make, prefill_flops
from .models import add_arguments as add_models
from .plot import lines
from .timing import ceilings, in_turns, table, write


COLUMNS = ["length", "model", "seconds", "least", "most", "tokens/s", "GFLOP/s", "share", "roofline s"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])


def run(args: argparse.Namespace, device: torch.device) -> None:
    limits = ceilings(device, DTYPES[args.dtype])
    models = {name: make(name, args, device) for name in args.models}
    rows, settings = [], {name: getattr(args, name) for name in ("size", "layers", "dtype", "batch")}
    for length in args.lengths:
        ids = torch.randint(4, 1000, (args.batch, length), device=device)
        runs = {name: lambda model=model, ids=ids: prompt(model, ids) for name, model in models.items()}
        for name in list(runs):
            try:
                runs[name]()
            except torch.OutOfMemoryError:
                rows.append({"length": length, "model": f"{name}: out of memory"})
                del runs[name]
        for name, found in in_turns(runs, device, args.rounds, warm_up=0).items():
            flops = prefill_flops(models[name], length, args.batch)
            rows.append(
                {
                    "length": length, "model": name, "seconds": found["median"], "least": found["least"],
                    "most": found["most"], "tokens/s": args.batch * length / found["median"],
                    "GFLOP/s": flops / found["median"] / 1e9,
                    "share": flops / found["median"] / limits["flops_per_second"],
                    "roofline s": flops / limits["flops_per_second"],
                }
            )  # fmt: skip
        file = write("prefill", device, {"settings": settings, "ceilings": limits, "rows": rows}, args.results)
    print(f"matrix products {limits['flops_per_second'] / 1e9:,.0f} GFLOP/s, {args.dtype}, batch {args.batch}\n")
    print(table(rows, COLUMNS))
    if file is not None:
        lines(file.with_suffix(".png"), rows, "length", "seconds", "prompt (tokens)", "seconds", "roofline s")


@torch.no_grad()
def prompt(model, ids: torch.Tensor) -> torch.Tensor:
    """Reads a prompt as `generate` does, and says one token."""
    options = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)
