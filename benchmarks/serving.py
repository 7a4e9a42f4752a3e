"""Serving in vLLM: our plugin beside a Granite-4 hybrid and a Llama of the same size, in the same vLLM.

mmmamba bench serving --results out
mmmamba bench serving --results out --lengths 1024 --rounds 7     # more rounds of some points; those that exist stay

One server per model, all started at once; vLLM's own `bench serve` sends them prompts of random tokens, to one server
at a time, in turns. Weights are random, answers have a fixed number of tokens, prefixes are not cached. Every server
has memory for the keys, values and states of all clients, or what --cache-gib says; then requests that do not fit
wait. With --results a point that the JSON has is not measured again.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import tempfile
from pathlib import Path

import torch

from .models import cache_bytes, cache_of_length, make_model
from .plot import grid_plot
from .server import Server, running_servers
from .timing import format_table, machine_info, write_result


logger = logging.getLogger(__name__)

POINT = ("length", "clients", "model")
# Columns of the table, and what they are in the results of `bench serve`.
MEASURES = {
    "requests/s": "request_throughput",
    "tokens/s": "output_throughput",
    "first token ms": "mean_ttft_ms",
    "token ms": "mean_tpot_ms",
}
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
SETTINGS = ("size", "layers", "dtype", "output_tokens", "requests", "batched_tokens", "cache_gib", "compile")
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
            for name in names:
                result["models"][name] = write_model(name, args, folders[name])
            caches = {name: result["models"][name]["cache GiB"] for name in names}
            servers = stack.enter_context(running_servers(folders, caches, args, device))
            for name, server in servers.items():
                warm_up(server, args)
                result["models"][name] |= server.capacity() | {"loaded MiB": server.memory()["RSS MiB"]}
            for length, clients, name in left:
                sample = measure(servers[name], args, length, clients, seed=len(result["samples"]))
                result["samples"].append({"length": length, "clients": clients, "model": name} | sample)
                result["models"][name]["peak MiB"] = servers[name].memory()["peak MiB"]
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
    if (machine["processor"], machine["cores"]) != (
        (here := machine_info(device))["processor"],
        here["cores"],
    ):
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
    for column in ("requests/s", "CPU s/request"):
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
    one = sum(cache_bytes(cache_of_length(model, max(args.lengths) + args.output_tokens)))
    # vLLM allots whole blocks, of the same size for keys and values as for states: some more than they take.
    return {"parameters": parameters, "cache GiB": args.cache_gib or 1.15 * max(args.clients) * one / 2**30}


def word_tokenizer(vocabulary: int):
    """A tokenizer whose text and ids correspond one to one, so that prompts have exactly the length asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=list(WORDS[3:]), **special)


def warm_up(server: Server, args: argparse.Namespace) -> None:
    """Two short requests, and a prompt of more than one step."""
    bench_serve(server, 1, 2, 128, 8, seed=0)
    bench_serve(server, 1, 1, min(args.batched_tokens + 128, max(args.lengths)), 8, seed=1)


def measure(server: Server, args: argparse.Namespace, length: int, clients: int, seed: int) -> dict:
    """One point once: throughput and latencies, and what of the server's cache was used at most."""
    requests = max(clients, args.requests)
    with server.watched() as usage:
        result = bench_serve(server, clients, requests, length, args.output_tokens, seed)
    sample = {column: result[key] for column, key in MEASURES.items()}
    usage["CPU s/request"] = usage.pop("CPU s") / requests
    return sample | {"seconds": result["duration"], "requests": requests} | usage


def bench_serve(server: Server, clients: int, requests: int, length: int, output_tokens: int, seed: int) -> dict:
    """Runs vLLM's `bench serve` in this process; its output goes to the server's log.

    Raises:
        RuntimeError: if a request failed or an answer has not the length asked for.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "host": "127.0.0.1", "port": server.port, "model": server.folder,
        "dataset-name": "random", "random-input-len": length, "random-output-len": output_tokens,
        "num-prompts": requests, "max-concurrency": clients, "seed": seed, "temperature": 0,
        "ready-check-timeout-sec": 0,
    }  # fmt: skip
    arguments = ["--disable-tqdm", *(f"--{name}={value}" for name, value in options.items())]
    with server.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = asyncio.run(main_async(parser.parse_args(arguments)))
    tokens = (result["completed"], result["total_input_tokens"], result["total_output_tokens"])
    if tokens != (requests, requests * length, requests * output_tokens):
        raise RuntimeError(
            f"{server.name} answered {tokens[0]} of {requests} requests, {tokens[1]} tokens read and {tokens[2]} "
            f"written; see {server.log}."
        )
    return result
