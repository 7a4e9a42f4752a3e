"""Serving in vLLM: our plugin beside a Granite-4 hybrid and a Llama of the same size, in the same vLLM.

mmmamba bench serving --results out
mmmamba bench serving --results out --lengths 1024 --rounds 7     # more rounds of some points; those that exist stay

One server per model, all started at once; vLLM's own `bench serve` sends them prompts of random tokens, to one server
at a time, in turns. Weights are random, answers have a fixed number of tokens, prefixes are not cached. Every server
has memory for the keys, values and states of all clients, or what --cache-gib says; then requests that do not fit
wait. With --results a point that the JSON has is not measured again.

On a machine that other work shares, --in-process measures vLLM's engine alone, by processor time (see engine.py).
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .arguments import OURS
from .engine import Engine
from .models import DTYPES, cache_bytes, cache_of_length, make_model
from .plot import grid_plot
from .server import Server
from .timing import format_table, machine_info, write_result


POINT = ("length", "clients", "model")
MEASURES = ("requests/s", "tokens/s", "first token ms", "token ms")
SAMPLED = (*MEASURES, "CPU s/request", "seconds", "cache MiB", "preempted")
COLUMNS = [
    *POINT,
    *MEASURES,
    "least requests/s",
    "most requests/s",
    "CPU s/request",
    "cache MiB",
    "preempted",
    "rounds",
]
SETTINGS = (
    "size", "layers", "dtype", "output_tokens", "requests", "batched_tokens", "cache_gib", "compile", "in_process",
)  # fmt: skip
WORDS = ("<unk>", "<s>", "</s>", "<img>", "<IMG_CONTEXT>", "</img>", "<image>")


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Runs `mmmamba bench serving`. Raises ValueError for results that were measured with other settings."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    result = earlier_result(args.results, device, settings) or {"settings": settings, "models": {}, "samples": []}
    points = [(length, clients) for length in args.lengths for clients in args.clients]
    left = left_to_measure(result["samples"], args.models, points, args.rounds)
    if left:
        with contextlib.ExitStack() as stack:
            folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = [name for name in args.models if any(name == model for _, _, model in left)]
            folders = {name: folder / name for name in names}
            models = {name: write_model(name, args, folders[name]) for name in names}
            caches = {name: model["cache GiB"] for name, model in models.items()}
            engines = stack.enter_context(running(folders, caches, args, device))
            for name, engine in engines.items():
                warm_up(engine, args)
                fit = engine.conversations_that_fit()
                models[name] |= {"fit at once": fit, "KiB per conversation": caches[name] * 2**20 / fit}
                models[name]["loaded MiB"], _ = engine.memory()
            for length, clients, name in left:
                requests, seed = max(clients, args.requests), len(result["samples"])
                sample = engines[name].measure(length, clients, requests, args.output_tokens, seed)
                result["samples"].append({"length": length, "clients": clients, "model": name} | sample)
                _, models[name]["peak MiB"] = engines[name].memory()
                if models[name]["longest"] >= result["models"].get(name, {"longest": 0})["longest"]:
                    result["models"][name] = models[name]
                print(format_table(result["samples"][-1:], [*POINT, *SAMPLED]), flush=True)
                write_result("serving", device, result, args.results)
    result["rows"] = rows_of(result["samples"])
    report(result)
    if args.results is not None:
        file = write_result("serving", device, result, args.results)
        plot(result["rows"], file.with_suffix(".png"))


def earlier_result(folder: Path | None, device: torch.device, settings: dict) -> dict | None:
    """What an earlier run wrote to this folder, if anything.

    Raises:
        ValueError: if it was measured with other settings or on another machine.
    """
    file = None if folder is None else folder / f"serving-{device.type}.json"
    if file is None or not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    machine = result.pop("machine")
    if result["settings"] != settings:
        raise ValueError(f"{file} was measured with {result['settings']}, not {settings}; give another --results.")
    here = machine_info(device)
    if (machine["processor"], machine["cores"]) != (here["processor"], here["cores"]):
        raise ValueError(f"{file} was measured on another machine, {machine['processor']}; give another --results.")
    return result


def left_to_measure(samples: list[dict], models: list[str], points: list[tuple[int, int]], rounds: int) -> list[tuple]:
    """(length, clients, model) in the order to measure: round by round, the models of a point one after the other.

    Each round begins with another model, so that drift hits all of them alike.
    """
    done = {}
    for sample in samples:
        point = tuple(sample[name] for name in POINT)
        done[point] = done.get(point, 0) + 1
    return [
        (length, clients, name)
        for turn in range(rounds)
        for length, clients in points
        for name in models[turn % len(models) :] + models[: turn % len(models)]
        if turn >= done.get((length, clients, name), 0)
    ]


def rows_of(samples: list[dict]) -> list[dict]:
    """A row per point: medians over its samples, with the least and most requests per second."""
    rows = []
    for point in sorted({tuple(sample[name] for name in POINT[:2]) for sample in samples}):
        here = [sample for sample in samples if (sample["length"], sample["clients"]) == point]
        for name in dict.fromkeys(sample["model"] for sample in here):
            mine = [sample for sample in here if sample["model"] == name]
            rates = [sample["requests/s"] for sample in mine]
            row = dict(zip(POINT, (*point, name), strict=True))
            row |= {column: statistics.median(sample[column] for sample in mine) for column in SAMPLED}
            rows.append(row | {"least requests/s": min(rates), "most requests/s": max(rates), "rounds": len(mine)})
    return rows


def ratios_of(rows: list[dict], column: str, of: str = "linear") -> list[dict]:
    """How many times as fast one model is as each other, by a rate or a time, a row per point."""
    power = 1 if column == "requests/s" else -1
    rates = {tuple(row[name] for name in POINT): row[column] ** power for row in rows}
    others = [name for name in dict.fromkeys(row["model"] for row in rows) if name != of]
    return [
        {"length": length, "clients": clients}
        | {
            f"{of}/{other}": rates[length, clients, of] / rates[length, clients, other]
            for other in others
            if (length, clients, other) in rates
        }
        for length, clients, name in rates
        if name == of
    ]


def report(result: dict) -> None:
    """Prints the models, the table of points and the ratios."""
    models = [{"model": name} | values for name, values in result["models"].items()]
    print(format_table(models, list(dict.fromkeys(column for row in models for column in row))), "\n")
    print(format_table(result["rows"], COLUMNS), "\n")
    for column in ("requests/s",) if result["settings"]["in_process"] else ("requests/s", "CPU s/request"):
        if ratios := ratios_of(result["rows"], column):
            print(f"how many times as fast, by medians of {column}")
            print(format_table(ratios, list(dict.fromkeys(key for row in ratios for key in row))), "\n")


def plot(rows: list[dict], file: Path) -> None:
    """Requests per second and time to the first token over the number of clients, a column per length."""
    grid_plot(file, rows, "length", "clients", ["requests/s", "tokens/s", "first token ms", "token ms"])


def write_model(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Writes a model folder with random weights and a tokenizer; returns what the table says of the model."""
    model = make_model(name, args, torch.device("cpu"))
    vision = sum(p.numel() for key, p in model.named_parameters() if "vision" in key)
    parameters = sum(p.numel() for p in model.parameters()) - vision
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(model.config.get_text_config().vocab_size)
    if hasattr(model.config, "vision_config"):
        from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
        from mmmamba.processing_mmmamba import MmMambaProcessor

        MmMambaProcessor(MmMambaImageProcessorPil(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    longest = max(args.lengths) + args.output_tokens
    # vLLM allots whole blocks, of the same size for keys and values as for states: some more than they take; and one
    # that nobody uses.
    cache = (1.15 * max(args.clients) + 1) * sum(cache_bytes(cache_of_length(model, longest))) / 2**30
    return {"parameters": parameters, "longest": longest, "cache GiB": args.cache_gib or cache}


def word_tokenizer(vocabulary: int):
    """A tokenizer whose text and ids correspond one to one, so that prompts have exactly the length asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=list(WORDS[3:]), **special)


def warm_up(engine: Server | Engine, args: argparse.Namespace) -> None:
    """Two short requests, and a prompt of more than one step."""
    engine.measure(min(128, *args.lengths), 1, 2, min(8, args.output_tokens), seed=0)
    engine.measure(min(args.batched_tokens + 128, max(args.lengths)), 1, 1, min(8, args.output_tokens), seed=1)


@contextlib.contextmanager
def running(
    folders: dict[str, Path], caches: dict[str, float], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Server | Engine]]:
    """Starts vLLM for each model folder, all with the same settings, and stops it at the end.

    Args:
        folders: By name of the model.
        caches: GiB for keys, values and states, by name of the model.
        args: Of the benchmark.
        device: CPU or GPU.
    """
    options = {
        "trust_remote_code": True, "dtype": str(DTYPES[args.dtype]).removeprefix("torch."),
        "max_model_len": max(args.lengths) + args.output_tokens, "max_num_seqs": max(args.clients),
        "max_num_batched_tokens": args.batched_tokens, "enable_prefix_caching": False,
        "enforce_eager": not args.compile,
    }  # fmt: skip
    if device.type == "cuda":
        options["gpu_memory_utilization"] = round(0.9 / len(folders), 2)
    engines = {}
    try:
        for name, folder in folders.items():
            text_only = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if name in OURS else {}
            kind = Engine if args.in_process else Server
            engines[name] = kind(name, folder, folder.with_suffix(".log"), caches[name], options | text_only)
        for engine in engines.values():
            engine.wait_until_ready()
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()
