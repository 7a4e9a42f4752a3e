"""What watching costs, and what answers are worth, by the number of frames that were seen.

    python -m mmmamba.examples.streaming.measure run linear 10000     # and so on for hybrid and teacher, 1000
    python -m mmmamba.examples.streaming.measure plot

`run` writes into benchmarks/results/streaming-cpu.json a row for every 100 frames: bytes kept, resident memory, wall and
processor time of reading a frame, and how many of three questions about the frame were answered right. Scenes are held
out; one stays for 15 frames on average.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mmmamba.benchmarks.timing import machine_info
from mmmamba.cli.arguments import positive
from mmmamba.cli.load import load_model
from mmmamba.examples.shapes.folder import SHIPPED
from mmmamba.examples.shapes.world import Picture, questions
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor

from .scenes import scenes
from .stream import Stream


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "streaming-cpu.json"
PLOT = Path(__file__).parents[2] / "docs" / "streaming.png"
HOLD = 15
EVERY = 100  # frames in a row
QUESTIONS = 3  # at each point
SHORT = (1, 3, 10, 30)  # frames after which short streams are asked
OPTIONS = {"max_new_tokens": 16, "do_sample": False}


def right_answers(stream: Stream, picture: Picture, rng: np.random.Generator) -> tuple[int, int]:
    """How many of up to `QUESTIONS` questions about the latest frame are answered right, and how many were asked."""
    asked = questions(rng, (picture,), QUESTIONS, {})
    return sum(stream.ask(question, OPTIONS) == answer for question, answer in asked), len(asked)


def read_many(stream: Stream, frames: Iterator[Picture], total: int) -> Iterator[dict]:
    """Reads `total` frames; yields a row after every `EVERY`."""
    rng, page = np.random.default_rng(0), os.sysconf("SC_PAGE_SIZE")
    while stream.frames < total:
        shown = list(islice(frames, EVERY))
        pixels = [np.asarray(picture.draw()) for picture in shown]
        wall, cpu = time.perf_counter(), time.process_time()
        deque(map(stream.read, pixels), maxlen=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        right, asked = right_answers(stream, shown[-1], rng)
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        yield {
            "frames": stream.frames,
            "tokens": stream.tokens,
            "bytes": stream.nbytes,
            "resident": resident,
            "wall_ms": 1000 * wall / EVERY,
            "cpu_ms": 1000 * cpu / EVERY,
            "right": right,
            "asked": asked,
        }


def run(name: str, total: int, streams: int) -> None:
    """Measures one of the shipped models."""
    torch.set_num_threads(1)
    folder = SHIPPED / name
    model = load_model(folder, "cpu", torch.float32)
    parts = (model, MmMambaTokenizerFast.from_pretrained(folder), MmMambaVideoProcessor.from_pretrained(folder))
    short = {count: [0, 0] for count in SHORT}
    for index in range(streams):
        stream, rng = Stream(*parts), np.random.default_rng(index)
        for picture in islice(scenes("test", 1, index, HOLD), SHORT[-1]):
            stream.read(np.asarray(picture.draw()))
            if stream.frames in short:
                for place, number in enumerate(right_answers(stream, picture, rng)):
                    short[stream.frames][place] += number
    print(name, short, flush=True)
    rows = []
    for row in read_many(Stream(*parts), scenes("test", 2, 0, HOLD), total):
        rows.append(row)
        if row["frames"] % 1000 == 0 or row["frames"] >= total:
            print(name, row, flush=True)
            write(name, {"short": short, "rows": rows})


def write(name: str, measured: dict) -> None:
    """Puts a model's measurements into the file, beside those of the others."""
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"models": {}}
    result["models"][name] = {"machine": machine_info(torch.device("cpu"))} | measured
    RESULTS.write_text(json.dumps(result) + "\n", encoding="utf-8")


def plot() -> None:
    """Draws what is kept and what a frame costs, and prints a table."""
    from matplotlib.figure import Figure

    models = json.loads(RESULTS.read_text(encoding="utf-8"))["models"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    kept, cost = figure.subplots(1, 2)
    for name, measured in models.items():
        rows = measured["rows"]
        frames = [row["frames"] for row in rows]
        kept.plot(frames, [row["bytes"] / 2**20 for row in rows], marker=".", markersize=3, label=name)
        cost.plot(frames, [row["cpu_ms"] for row in rows], marker=".", markersize=3, label=name)
        for least, most in ((1, 1000), (1001, 10**9)):
            part = [row for row in rows if least <= row["frames"] <= most]
            if part:
                print(f"{name}, frames {least:,} to {part[-1]['frames']:,}: {summary(part)}")
        print(f"{name}, short streams: {measured['short']}")
    kept.set(xscale="log", yscale="log", xlabel="frames read", ylabel="kept (MiB)")
    cost.set(xscale="log", yscale="log", xlabel="frames read", ylabel="processor time per frame (ms)")
    for axes in (kept, cost):
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=120)


def summary(rows: list[dict]) -> dict:
    """Medians and sums over rows."""
    asked = sum(row["asked"] for row in rows)
    return {
        "bytes": [rows[0]["bytes"], rows[-1]["bytes"]],
        "resident MiB": [round(row["resident"] / 2**20, 1) for row in (rows[0], rows[-1])],
        "cpu ms": round(statistics.median(row["cpu_ms"] for row in rows), 1),
        "wall ms": round(statistics.median(row["wall_ms"] for row in rows), 1),
        "right": f"{sum(row['right'] for row in rows)} of {asked}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure a model")
    one.add_argument("model", choices=("linear", "hybrid", "teacher"))
    one.add_argument("frames", type=positive)
    one.add_argument("--streams", type=positive, default=32, help="short streams (default: 32)")
    commands.add_parser("plot", help="draw docs/streaming.png and print the figures")
    args = parser.parse_args()
    if args.command == "run":
        run(args.model, args.frames, args.streams)
    else:
        plot()


if __name__ == "__main__":
    main()
