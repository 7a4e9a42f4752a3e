"""Where the time of one more token goes: matrix products, what is left of a layer beside them, and all else.

python -m mmmamba.benchmarks.laptop.profile DIR --context 256

A layer's products are timed one after the other by themselves, its whole from its first operation to its last: a fused
layer has no parts that could be timed within it. What is left is the difference.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mmmamba.backends_mmmamba import project
from mmmamba.benchmarks.timing import format_table, processor_name
from mmmamba.cli.load import load_model
from mmmamba.quantization_mmmamba import QuantizedLinear

from .ours import WARM_UP, cache_after, decode, timed


COLUMNS = ["part", "ms", "ms each", "GB/s"]


@torch.no_grad()
def profile(model, context: int, steps: int) -> list[dict]:
    """Rows of `COLUMNS`: milliseconds of a step, of one layer, and the rate at which weights are read."""
    cache = cache_after(model, context)
    token, _ = decode(model, cache, torch.tensor([[5]]), WARM_UP)
    decoder, kinds = model.model.layers, [layer.layer_type for layer in model.model.layers]
    seconds = statistics.median(decode(model, cache, token, steps)[1])
    of_layers = _layer_seconds(model, cache, token, steps)
    of_products = [_product_seconds(model, steps, layer) for layer in decoder]
    head = _product_seconds(model, steps, model.lm_head)
    rows = [{"part": "all", "ms": 1e3 * seconds}]
    for kind in dict.fromkeys(kinds):
        mine = [index for index, other in enumerate(kinds) if other == kind]
        whole, products = (sum(times[i] for i in mine) for times in (of_layers, of_products))
        read = sum(x.weight.nbytes for i in mine for x in _linear(decoder[i]))
        for part, time_of, rate in (
            (f"{kind}: products", products, read / products / 1e9),
            (f"{kind}: beside them", whole - products, None),
        ):
            rows.append({"part": part, "ms": 1e3 * time_of, "ms each": 1e3 * time_of / len(mine), "GB/s": rate})
    rows.append({"part": "head", "ms": 1e3 * head, "GB/s": model.lm_head.weight.nbytes / head / 1e9})
    rows.append({"part": "all else", "ms": 1e3 * (seconds - sum(of_layers) - head)})
    return rows


def _layer_seconds(model, cache, token: Tensor, steps: int) -> list[float]:
    """Medians of each layer's seconds within a step."""
    times, started = defaultdict(list), {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        hooks += [
            layer.register_forward_pre_hook(lambda *_, i=index: started.update({i: time.perf_counter()})),
            layer.register_forward_hook(lambda *_, i=index: times[i].append(time.perf_counter() - started[i])),
        ]
    decode(model, cache, token, steps)
    for hook in hooks:
        hook.remove()
    return [statistics.median(times[index]) for index in range(len(model.model.layers))]


def _product_seconds(model, steps: int, part: nn.Module) -> float:
    """The median of the seconds that a part's products with one row take, its weights not in the processor's cache.

    What a call takes whatever it multiplies is taken off: a fused layer has no such calls.
    """
    calls, empty_calls = (
        [(layer, torch.randn(1, 1, layer.in_features, dtype=model.dtype)) for layer in layers]
        for layers in (_linear(part), [_smallest(layer, model.dtype) for layer in _linear(part)])
    )
    other = torch.empty(2**26)  # 256 MB, more than caches hold
    seconds = []
    for _ in range(steps):
        other.fill_(1)
        both = [timed(lambda some=some: [project(layer, x) for layer, x in some]) for some in (calls, empty_calls)]
        seconds.append(both[0] - both[1])
    return statistics.median(seconds)


def _smallest(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer of the same kind with hardly any weights."""
    if not isinstance(layer, QuantizedLinear):
        return nn.Linear(32, 16, bias=False, dtype=dtype)
    made = QuantizedLinear(32, 16, layer.bits)
    made.weight.zero_()
    return made


def _linear(part: nn.Module) -> list[nn.Module]:
    return [module for module in part.modules() if isinstance(module, nn.Linear | QuantizedLinear)]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmmamba.benchmarks.laptop.profile", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    parser.add_argument("--context", type=int, default=256, help="tokens before it (default: 256)")
    parser.add_argument("--steps", type=int, default=16, help="times that everything is timed (default: 16)")
    parser.add_argument("--threads", type=int, help="(default: torch's choice)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = profile(load_model(args.folder, "cpu"), args.context, args.steps)
    print(f"{args.folder.name} after {args.context} tokens, {torch.get_num_threads()} threads of {processor_name()}")
    print(format_table(rows, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
