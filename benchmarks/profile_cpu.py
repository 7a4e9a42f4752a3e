"""Where the small linear model spends its time on a CPU: `python benchmarks/profile_cpu.py decode` or `prefill`."""

import argparse

import torch
from torch.profiler import profile

from mmmamba.benchmarks.models import cache_of_length, decode_step, make_model
from mmmamba.benchmarks.prefill import generate_one


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("phase", choices=("decode", "prefill"))
parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
args = argparse.Namespace(size="small", layers=None, batch=1, **vars(parser.parse_args()))
model = make_model("linear", args, torch.device("cpu"))
if args.phase == "decode":
    run, repeats = decode_step(model, cache_of_length(model, 1024)), 20
else:
    ids = torch.randint(4, 1000, (1, 4096))
    run, repeats = lambda: generate_one(model, ids), 1
run()  # warms up
with profile() as profiler:
    for _ in range(repeats):
        run()
print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=30))
