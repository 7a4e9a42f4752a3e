"""Where the time of the small linear model goes on a CPU: `python benchmarks/profiled.py decode` or `prefill`."""

import argparse

import torch
from torch.profiler import profile

from mmmamba.benchmarks.models import make, read, stepper
from mmmamba.benchmarks.prefill import prompt


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("what", choices=("decode", "prefill"))
parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
args = argparse.Namespace(size="small", layers=None, batch=1, **vars(parser.parse_args()))
model = make("linear", args, torch.device("cpu"))
ids = torch.randint(4, 1000, (1, 4096))
step = stepper(model, read(model, 1024), 1, recorded=False)
run, times = (step, 20) if args.what == "decode" else (lambda: prompt(model, ids), 1)
run()
with profile() as found:
    for _ in range(times):
        run()
print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=30))
