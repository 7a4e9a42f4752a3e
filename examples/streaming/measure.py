"""What watching costs, and what answers are worth, by the number of frames that were seen.

    python -m mmmamba.examples.streaming.measure run linear 10000 --batch 20    # also hybrid and teacher
    python -m mmmamba.examples.streaming.measure plot

`run` writes into benchmarks/results/streaming-cpu.json a row for every 100 frames: bytes of state, resident memory,
wall and processor time of reading a frame; for every 500 frames how many of three questions about the latest one were
answered right. Short streams are asked after 1, 3, 10 and 30 frames. Scenes are held out; one stays for 15 frames on
average.
"""

import argparse
import gc
import json
import os
import statistics
import time
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
ASK_EVERY = 500  # frames
QUESTIONS = 3  # at each point
SHORT = (1, 3, 10, 30)  # frames after which short streams are asked
OPTIONS = {"max_new_tokens": 16, "do_sample": False}


def right_answers(stream: Stream, picture: Picture, rng: np.random.Generator) -> tuple[int, int]:
    """How many of up to `QUESTIONS` questions about the latest frame are answered right, and how many were asked."""
    asked = questions(rng, (picture,), QUESTIONS, {})
    return sum(stream.ask(question, OPTIONS) == answer for question, answer in asked), len(asked)


def read_many(stream: Stream, frames: Iterator[Picture], total: int, batch: int) -> Iterator[dict]:
    """Reads `total` frames, `batch` at once; yields a row after every `EVERY`."""
    rng, page = np.random.default_rng(0), os.sysconf("SC_PAGE_SIZE")
    while stream.frames < total:
        shown = list(islice(frames, EVERY))
        pixels = [np.asarray(picture.draw()) for picture in shown]
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, EVERY, batch):
            stream.read(*pixels[start : start + batch])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        right, asked = right_answers(stream, shown[-1], rng) if stream.frames % ASK_EVERY == 0 else (0, 0)
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


def run(name: str, total: int, batch: int, streams: int) -> None:
    """Measures one of the shipped models."""
    torch.set_num_threads(1)
    folder = SHIPPED / name
    model = load_model(folder, "cpu", torch.float32)
    parts = (model, MmMambaTokenizerFast.from_pretrained(folder), MmMambaVideoProcessor.from_pretrained(folder))
    if streams:
        write(short={name: answers_in_short_streams(parts, streams)})
    rows = []
    for row in read_many(Stream(*parts), scenes("test", 2, 0, HOLD), total, batch):
        rows.append(row)
        if row["frames"] % 1000 == 0 or row["frames"] >= total:
            print(name, row, flush=True)
            machine = machine_info(torch.device("cpu"))
            write(runs={f"{name}, {batch} at once": {"model": name, "batch": batch, "machine": machine, "rows": rows}})


def answers_in_short_streams(parts: tuple, streams: int) -> dict[int, list[int]]:
    """Right answers and questions by the number of frames that were seen."""
    found = {count: [0, 0] for count in SHORT}
    for index in range(streams):
        stream, rng = Stream(*parts), np.random.default_rng(index)
        for picture in islice(scenes("test", 1, index, HOLD), SHORT[-1]):
            stream.read(np.asarray(picture.draw()))
            if stream.frames in found:
                for place, number in enumerate(right_answers(stream, picture, rng)):
                    found[stream.frames][place] += number
    return found


def write(**measured: dict) -> None:
    """Puts measurements into the file, beside others."""
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"short": {}, "runs": {}}
    for name, values in measured.items():
        result[name] |= values
    RESULTS.write_text(json.dumps(result) + "\n", encoding="utf-8")


def plot() -> None:
    """Draws the bytes of state and what a frame costs, and prints a table."""
    from matplotlib.figure import Figure

    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    state, cost = figure.subplots(1, 2)
    colors = {"linear": "C0", "hybrid": "C1", "teacher": "C2"}
    for name, measured in result["runs"].items():
        rows, color = measured["rows"], colors[measured["model"]]
        frames = [row["frames"] for row in rows]
        if measured["batch"] > 1:
            state.plot(frames, [row["bytes"] / 2**20 for row in rows], marker=".", color=color, label=name)
        style = "-" if measured["batch"] > 1 else ":"
        cost.plot(frames, [row["cpu_ms"] for row in rows], style, marker=".", markersize=3, color=color, label=name)
        for least, most in ((1, 1000), (1001, 10**9)):
            part = [row for row in rows if least <= row["frames"] <= most]
            if part:
                print(f"{name}, frames {least:,} to {part[-1]['frames']:,}: {summary(part)}")
    for name, counts in result["short"].items():
        print(f"{name}, right answers by frames seen: {counts}")
    state.set(xscale="log", yscale="log", xlabel="frames read", ylabel="state (MiB)")
    cost.set(xscale="log", yscale="log", xlabel="frames read", ylabel="processor time per frame (ms)", ylim=(1, 100))
    for axes in (state, cost):
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
    one.add_argument("--batch", type=int, choices=(1, 10, 20), default=1, help="frames that are read at once")
    one.add_argument("--streams", type=int, default=32, help="short streams, 0 for none (default: 32)")
    commands.add_parser("plot", help="draw docs/streaming.png and print the figures")
    args = parser.parse_args()
    if args.command == "run":
        run(args.model, args.frames, args.batch, args.streams)
    else:
        plot()


if __name__ == "__main__":
    main()
