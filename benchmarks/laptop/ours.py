"""One measurement of one of our models, in a process of its own, so that its memory is that of the model alone.

python -m mmmamba.benchmarks.laptop.ours DIR --context 256      # one more token, again and again
python -m mmmamba.benchmarks.laptop.ours DIR --prompt 512       # reading a prompt

Prints JSON: `rates`, the tokens per second of each repetition, as llama-bench's, and bytes. A token takes the model's
`forward` with the cache and the choice of the likeliest token.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mmmamba.benchmarks.memory import process_status
from mmmamba.benchmarks.models import cache_bytes
from mmmamba.cache_mmmamba import CACHE, MmMambaCache, expected_shapes
from mmmamba.cli.load import load_model

from .our_models import weight_bytes


# Longer contexts are not read: keys, values and states are random. Reading them is measured by itself, and how long a
# step takes does not depend on what the cache holds.
LONGEST_READ = 8192
WARM_UP = 4  # tokens


@torch.no_grad()
def measure(folder: Path, prompt: int | None, context: int | None, steps: int, repetitions: int) -> dict:
    """Loads a model and times reading `prompt` tokens, or `steps` tokens one by one after `context` tokens."""
    libraries = process_status("VmRSS")
    start = time.perf_counter()
    model = load_model(folder, "cpu")
    loaded = time.perf_counter() - start
    torch.manual_seed(0)
    total, read = weight_bytes(folder)
    result = {"file bytes": total, "libraries bytes": libraries, "load seconds": loaded}
    if prompt is not None:
        ids = torch.randint(4, model.config.text_config.vocab_size, (1, prompt))
        read_prompt(model, ids)
        result["rates"] = [prompt / timed(lambda: read_prompt(model, ids)) for _ in range(repetitions)]
    else:
        cache = cache_after(model, context)
        token, _ = decode(model, cache, torch.tensor([[5]]), WARM_UP)
        snapshot, seconds = cache.snapshot(), []
        for _ in range(repetitions):
            cache.restore(snapshot)
            token, of_each = decode(model, cache, token, steps)
            seconds.append(of_each)
        result["rates"] = [steps / sum(of_each) for of_each in seconds]
        result["seconds"] = seconds
        key_value, states = cache_bytes(cache)
        result["step bytes"] = read + key_value + 2 * states
    return result | {"peak bytes": process_status("VmHWM"), "threads": torch.get_num_threads()}


def timed(function) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read_prompt(model, ids: Tensor) -> MmMambaCache:
    """A cache that has read a prompt (1, length) as `generate` does, up to the logits of its last token."""
    cache, length = model.new_cache(), ids.shape[1]
    size = model.default_chunk_size(1, length, ids.device)
    last = (length - 1) // size * size
    model.read_prompt(cache, ids, stop=last)
    model(ids[:, last:], use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def cache_after(model, context: int) -> MmMambaCache:
    """A cache of so many tokens: of random ones, or, if they are more than `LONGEST_READ`, of random contents."""
    config = model.config.text_config
    read = context if context <= LONGEST_READ else 16
    cache = read_prompt(model, torch.randint(4, config.vocab_size, (1, read)))
    if context <= LONGEST_READ:
        return cache
    kinds, filled = cache.tensors(), {}
    for name, shape in expected_shapes(config, context).items():
        if name.endswith(("keys", "values")):  # one key or value for all places, so that it takes no memory
            filled[name] = torch.randn(*shape[:2], 1, shape[3]).to(kinds[name].dtype).expand(shape)
        else:
            filled[name] = torch.randn(shape).to(kinds[name].dtype)
    cache = model.new_cache()
    cache.load_tensors(filled, context)
    return cache


def decode(model, cache: MmMambaCache, token: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """Continues greedily from a token (1, 1); returns the last one and the seconds of each."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(token, use_cache=True, **{CACHE: cache}).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
    return token, seconds


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmmamba.benchmarks.laptop.ours", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=int, metavar="N", help="time reading so many tokens")
    what.add_argument("--context", type=int, metavar="N", help="time a token after so many")
    parser.add_argument("--steps", type=int, default=32, help="tokens of a repetition (default: 32)")
    parser.add_argument("--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("--threads", type=int, help="(default: torch's choice)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.folder, args.prompt, args.context, args.steps, args.repetitions)))


if __name__ == "__main__":
    main(sys.argv[1:])
