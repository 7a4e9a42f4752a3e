"""What the measurements come to: rates with their least time by bytes read, memory, and which goals are reached."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from mmmamba.benchmarks.arguments import LAPTOP_OURS, LAPTOP_PEERS
from mmmamba.benchmarks.plot import line_plot

from .gguf_models import FORMATS


NAMES = {
    "linear": "mmMamba-linear",
    "hybrid": "mmMamba-hybrid",
    "llama": "llama.cpp, Llama",
    "granite": "llama.cpp, Mamba-2 hybrid",
}
OUR_FORMATS = {16: "bf16", 8: "8 bits", 4: "4 bits"}
# Goals: how many times as fast as the peer, by context; how much memory, of the size of the peer's file.
LINEAR_TO_LLAMA = {256: 1.1, 4096: 2.0, 32768: 5.0}
LINEAR_TO_GRANITE = 1.3
AT_BF16, READING = 1.0, 1.0
MEMORY = 1.15


def name_of(model: str, bits: int) -> str:
    """A candidate as tables name it, such as `llama.cpp, Llama, Q4_0`."""
    return f"{NAMES[model]}, {(OUR_FORMATS if model in LAPTOP_OURS else FORMATS)[bits]}" if bits else "memory"


def point_name(what: str, tokens: int) -> str:
    """What is measured, such as `after 4,096`."""
    return f"reading {tokens:,}" if what == "prompt" else f"after {tokens:,}"


def line_of(sample: dict) -> str:
    """A sample, as it is printed when it was taken."""
    if sample["what"] == "bandwidth":
        loop, rate = max(sample["bytes/s"].items(), key=lambda item: item[1])
        return f"memory is read at {rate / 1e9:.1f} GB/s ({loop})"
    rate, peak = statistics.median(sample["rates"]), sample["peak bytes"] / 1e9
    name, point = name_of(sample["model"], sample["bits"]), point_name(sample["what"], sample["tokens"])
    return f"{name}, {point}: {rate:.2f} tokens/s, {peak:.2f} GB"


def results(samples: list[dict], gguf_bytes: Mapping[tuple[str, int], int]) -> dict:
    """Everything that is reported.

    Args:
        samples: See `Samples`.
        gguf_bytes: Sizes of the peers' files by (model, bits).

    Returns:
        `bandwidth` (bytes per second, and the loop that reached it), `rows`, `goals`, `samples`; when the first and
        the last of ours and of theirs were `measured`; the commits of `llama.cpp`.
    """
    rates = [(rate, loop) for x in samples if x["what"] == "bandwidth" for loop, rate in x["bytes/s"].items()]
    bandwidth, loop = max(rates)
    rows = rows_of([sample for sample in samples if sample["what"] != "bandwidth"], bandwidth)
    measured = {}
    for whose, models in (("mmMamba", LAPTOP_OURS), ("llama.cpp", LAPTOP_PEERS)):
        if times := [sample["at"] for sample in samples if sample["model"] in models]:
            measured[whose] = [min(times), max(times)]
    return {
        "measured": measured,
        "llama.cpp": sorted({sample["commit"] for sample in samples if sample["model"] in LAPTOP_PEERS}),
        "bandwidth": {"bytes/s": bandwidth, "loop": loop},
        "rows": rows,
        "goals": goals_of(rows, gguf_bytes),
        "samples": samples,
    }


def rows_of(samples: list[dict], bandwidth: float) -> list[dict]:
    """A row for each thing that was measured: the median over its samples of the median over a sample's repetitions.

    `least ms` is the time that reading the step's bytes takes at the best rate, `share` how much of that rate is
    reached.
    """
    rows = []
    keys = [(x["model"], x["bits"], x["what"], x["tokens"]) for x in samples]
    for key in dict.fromkeys(keys):
        model, bits, what, tokens = key
        mine = [sample for sample, other in zip(samples, keys, strict=True) if other == key]
        rate = statistics.median(statistics.median(sample["rates"]) for sample in mine)
        every = [rate for sample in mine for rate in sample["rates"]]
        row = {"model": model, "bits": bits, "format": name_of(model, bits), "what": what, "tokens": tokens}
        row |= {"tokens/s": rate, "least tokens/s": min(every), "most tokens/s": max(every), "rounds": len(mine)}
        row |= {"peak bytes": max(sample["peak bytes"] for sample in mine), "file bytes": mine[0]["file bytes"]}
        if model in LAPTOP_OURS:
            row["libraries bytes"] = max(sample["libraries bytes"] for sample in mine)
        if what == "step":
            least = mine[0]["step bytes"] / bandwidth
            row |= {"ms": 1e3 / rate, "step bytes": mine[0]["step bytes"], "least ms": 1e3 * least}
            row["share"] = least * rate
        rows.append(row)
    return rows


def goals_of(rows: list[dict], gguf_bytes: Mapping[tuple[str, int], int]) -> list[dict]:
    """The goals of which both sides were measured: `goal`, `ours`, `theirs`, `ratio`, `target`, `reached`."""
    found = {(row["model"], row["bits"], row["what"], row["tokens"]): row for row in rows}
    goals = []

    def faster(target: float, model: str, peer: str, bits: int, what: str, tokens: int) -> None:
        ours, theirs = found.get((model, bits, what, tokens)), found.get((peer, bits, what, tokens))
        if ours and theirs:
            ratio = ours["tokens/s"] / theirs["tokens/s"]
            goal = f"{ours['format']} / {theirs['format']}, {point_name(what, tokens)}, tokens/s"
            goals.append(
                {"goal": goal, "ours": ours["tokens/s"], "theirs": theirs["tokens/s"], "ratio": ratio}
                | {"target": f"≥ {target}", "reached": ratio >= target}
            )

    for context, target in LINEAR_TO_LLAMA.items():
        faster(target, "linear", "llama", 4, "step", context)
    for context in LINEAR_TO_LLAMA:
        faster(LINEAR_TO_GRANITE, "linear", "granite", 4, "step", context)
    faster(AT_BF16, "linear", "llama", 16, "step", 256)
    for model, bits, what, tokens in found:
        if model in LAPTOP_OURS and what == "prompt":
            faster(READING, model, "llama", bits, what, tokens)
    for bits in FORMATS:
        steps = [row for row in rows if (row["model"], row["bits"], row["what"]) == ("linear", bits, "step")]
        if steps and ("llama", bits) in gguf_bytes:
            row, file = min(steps, key=lambda row: row["tokens"]), gguf_bytes["llama", bits]
            for name, ours in (
                ("memory without libraries", row["peak bytes"] - row["libraries bytes"]),
                ("whole memory", row["peak bytes"]),
            ):
                goal = f"{row['format']}, {point_name('step', row['tokens'])}: {name} / {FORMATS[bits]} file, GB"
                goals.append(
                    {"goal": goal, "ours": ours / 1e9, "theirs": file / 1e9, "ratio": ours / file}
                    | {"target": f"≤ {MEMORY}", "reached": ours <= MEMORY * file}
                )
    return goals


def markdown(result: dict) -> str:
    """Tables of rates and memory, of steps beside the bytes that they read, and of the goals."""
    rows = result["rows"]
    points = sorted({(row["what"], row["tokens"]) for row in rows})
    rows = sorted(rows, key=lambda row: (row["bits"], list(NAMES).index(row["model"]), row["tokens"]))
    formats = dict.fromkeys(row["format"] for row in rows)
    table = []
    for name in formats:
        mine = {(row["what"], row["tokens"]): row for row in rows if row["format"] == name}
        first = mine[min(mine, key=lambda point: (point[0] != "step", point[1]))]
        cells = [f"{mine[point]['tokens/s']:.1f}" if point in mine else "" for point in points]
        libraries = first.get("libraries bytes")
        memory = f"{first['peak bytes'] / 1e9:.2f}" + (f" ({libraries / 1e9:.2f})" if libraries else "")
        table.append([name, *cells, memory, f"{first['file bytes'] / 1e9:.2f}"])
    columns = ["tokens/s", *(point_name(*point) for point in points), "memory (of it libraries), GB", "weights, GB"]
    parts = [_table(columns, table)]
    parts += [f"{whose} was measured from {first} to {last}." for whose, (first, last) in result["measured"].items()]
    steps = [
        (
            row["format"], f"{row['tokens']:,}", f"{row['ms']:.1f}", f"{row['step bytes'] / 1e9:.2f}",
            f"{row['least ms']:.1f}", f"{row['share']:.0%}",
        )
        for row in rows
        if row["what"] == "step"
    ]  # fmt: skip
    rate, loop = result["bandwidth"]["bytes/s"] / 1e9, result["bandwidth"]["loop"]
    parts.append(f"Memory is read at {rate:.1f} GB/s at best ({loop}), so that a step takes at least:")
    parts.append(_table(["model", "context", "ms", "GB read", "least ms", "share"], steps))
    goals = [
        (
            x["goal"], f"{x['ours']:.2f}", f"{x['theirs']:.2f}", f"{x['ratio']:.2f}", x["target"],
            "yes" if x["reached"] else "no",
        )
        for x in result["goals"]
    ]  # fmt: skip
    if goals:
        reached = sum(x["reached"] for x in result["goals"])
        parts.append(f"{reached} of {len(goals)} goals are reached:")
        parts.append(_table(["goal", "ours", "theirs", "ratio", "target", "reached"], goals))
    parts += [f"{name} is left out: {error}" for name, error in result["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[dict], file: Path) -> None:
    """Tokens per second over context, of the fewest bits that were measured, and what reading memory would allow."""
    steps = [row for row in rows if row["what"] == "step"]
    if not steps:
        return
    fewest = min(row["bits"] for row in steps)
    points = [
        {"model": row["format"], "context": row["tokens"], "tokens/s": row["tokens/s"]}
        | {"by bytes read": 1e3 / row["least ms"]}
        for row in sorted(steps, key=lambda row: row["tokens"])
        if row["bits"] == fewest
    ]
    line_plot(file, points, "context", "tokens/s", "context (tokens)", "tokens per second", dashed="by bytes read")
