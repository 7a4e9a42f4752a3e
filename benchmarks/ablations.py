"""Ablations of the distillation recipes: students of the picture world, three seeds each, scored by their answers.

    python benchmarks/ablations.py run             # all experiments, one per CPU core at a time; resumes what stopped
    python benchmarks/ablations.py run stages      # one group of them
    python benchmarks/ablations.py report          # tables and plots of the finished ones

Every experiment is `mmmamba distill` with a recipe of the package and some overrides, which
`runs/ablations/NAME-SEED/recipe.yaml` records. Scores are exact matches of generated answers to held-out questions.
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

from mmmamba.benchmarks.plot import bar_plot
from mmmamba.benchmarks.timing import processor_name
from mmmamba.conversion.distillation.recipe import RECIPES, load_recipe, resolve_path
from mmmamba.conversion.shards import write_text


FOLDER = Path("runs/ablations")
SEEDS = (0, 1, 2)
TEACHER = "mmmamba:examples/shapes/teacher"
# Steps of 16 conversations that the stages of a short run share.
BUDGET = 600


def stage_overrides(stage: int, steps: int) -> list[str]:
    """Recipe overrides for a stage of `steps`, a tenth of them warmup and a quarter decay."""
    values = {
        "steps": steps,
        "warmup": steps // 10,
        "decay": steps // 4,
        "batch_size": 16,
        "per_device_batch_size": 16,
    }
    return [f"stage_{stage}.{key}={value}" for key, value in values.items()]


def short_run(*stages: int) -> list[str]:
    """Overrides for these stages, which share `BUDGET` 1 : 2 : 3; stage 3 trains only the mixers, as published."""
    overrides = [f"stages={list(stages)}", "stage_3.trainable=mixers", "stage_3.hard_weight=0", "evaluate=500"]
    for stage in stages:
        overrides += stage_overrides(stage, steps=BUDGET * stage // sum(stages))
    return overrides


# Experiments by group and name: recipe and overrides.
GROUPS: dict[str, dict[str, tuple[str, list[str]]]] = {
    # The recipes as they are.
    "students": {"linear": ("shapes-linear", []), "hybrid": ("shapes-hybrid", [])},
    # arXiv 2502.13145, tables 3 and 4.
    "stages": {
        "stages-" + "".join(map(str, stages)): ("shapes-linear", short_run(*stages))
        for stages in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
    },
    "initialization": {
        f"initialization-{name}": ("shapes-linear", [*short_run(1, 2, 3), f"initialization={name}"])
        for name in ("scratch", "inherited")
    },
    # The same, tables 5 and 6.
    "placement": {
        f"placement-{strategy}": ("shapes-hybrid", [*short_run(1, 2, 3), f"strategy={strategy}"])
        for strategy in ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked", "measured")
    },
    "count": {
        f"count-{count}": ("shapes-hybrid", [*short_run(1, 2, 3), f"num_attention={count}"]) for count in (1, 3, 4, 5)
    },
}
# Tables of the report: row labels and experiments, some of which stand in several tables.
TABLES = {
    "students": {"teacher": "teacher", "linear": "linear", "hybrid": "hybrid"},
    "stages": {"+".join(name.removeprefix("stages-")): name for name in GROUPS["stages"]},
    "initialization": {
        "scratch": "initialization-scratch",
        "inherited": "initialization-inherited",
        "inherited + mimic": "stages-123",
    },
    "placement of two": {name.removeprefix("placement-"): name for name in GROUPS["placement"]},
    "attention layers": {
        "0": "stages-123",
        "1": "count-1",
        "2": "placement-head-interleaved",
        **{str(count): f"count-{count}" for count in (3, 4, 5)},
        "6 (the teacher)": "teacher",
    },
}


def experiment_folder(name: str, seed: int) -> Path:
    return FOLDER / f"{name}-{seed}"


def read_scores(name: str, seed: int) -> dict | None:
    """An experiment's scores, None if it is not finished."""
    file = experiment_folder(name, seed) / "results.json"
    return json.loads(file.read_text(encoding="utf-8")).get("scores") if file.is_file() else None


def run_experiment(name: str, recipe: str, overrides: list[str], seed: int) -> bool:
    """Runs an experiment, unless it is finished, in a subprocess with one thread; returns whether it succeeded."""
    if read_scores(name, seed) is not None:
        return True
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmmamba", "distill", str(RECIPES / f"{recipe}.yaml"), *overrides]
    command += [f"seed={seed}", f"output={experiment_folder(name, seed)}", f"teacher={TEACHER}", "workers=0"]
    with (FOLDER / f"{name}-{seed}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    print(f"{name} {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)
    return done.returncode == 0


def run(groups: list[str], workers: int) -> bool:
    """Runs groups of experiments, seed by seed. Returns whether all of them succeeded."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run_experiment, name, recipe, overrides, seed)
            for seed in SEEDS
            for group in groups
            for name, (recipe, overrides) in GROUPS[group].items()
        ]
    return all(job.result() for job in jobs)


def teacher_scores() -> dict:
    """The teacher's scores on the questions that the recipes ask their students; computed once."""
    file = FOLDER / "teacher.json"
    if not file.is_file():
        from mmmamba.examples.shapes.evaluate import evaluate

        FOLDER.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(evaluate(resolve_path(TEACHER), load_recipe("shapes-linear").evaluate)))
    return json.loads(file.read_text(encoding="utf-8"))


def summarize() -> dict[str, dict[str, dict]]:
    """By table and row: scores of each seed, mean and standard deviation, means by kind of question; in percent."""
    teacher, tables = teacher_scores(), {}
    for table, rows in TABLES.items():
        for label, name in rows.items():
            by_seed = [teacher] if name == "teacher" else [x for seed in SEEDS if (x := read_scores(name, seed))]
            if not by_seed:
                continue
            totals = [100 * scores["total"]["exact"] for scores in by_seed]
            tables.setdefault(table, {})[label] = {
                "experiment": name,
                "questions": by_seed[0]["questions"],
                "seeds": totals,
                "mean": statistics.mean(totals),
                "spread": statistics.stdev(totals) if len(totals) > 1 else None,
                "kinds": {
                    kind: statistics.mean(100 * scores["kinds"][kind]["exact"] for scores in by_seed)
                    for kind in by_seed[0]["kinds"]
                },
            }
    return tables


def report(file: Path) -> None:
    """Writes the summary as JSON and a plot, and prints it as Markdown tables."""
    tables = summarize()
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "processor": processor_name(), "cores": os.cpu_count()}
    file.write_text(json.dumps(result | {"tables": tables}, indent=2) + "\n", encoding="utf-8")
    plot(tables, file.with_suffix(".png"))
    for table, rows in tables.items():
        print(f"\n| {table} | exact match, % | each seed |\n|---|---|---|")
        for label, row in rows.items():
            spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
            print(f"| {label} | {row['mean']:.1f}{spread} | {', '.join(f'{value:.1f}' for value in row['seeds'])} |")
    kinds = list(tables["students"]["teacher"]["kinds"])
    print(f"\n| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for label, row in tables["students"].items():
        cells = [f"{row['kinds'][kind]:.1f}" for kind in kinds]
        print(f"| {label} | {' | '.join(cells)} |")


def plot(tables: dict, file: Path) -> None:
    """Draws each table's means, with error bars from the worst to the best seed."""
    panels = {
        table: {label: (row["mean"], min(row["seeds"]), max(row["seeds"])) for label, row in rows.items()}
        for table, rows in tables.items()
    }
    bar_plot(file, panels, "exact match (%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run experiments")
    run_parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    run_parser.add_argument("--workers", type=int, default=os.cpu_count(), help="experiments at once")
    report_parser = commands.add_parser("report", help="tables and plots of the finished experiments")
    report_parser.add_argument("--json", type=Path, default=Path("benchmarks/results/distillation.json"))
    args = parser.parse_args()
    if args.command == "report":
        report(args.json)
        return
    if unknown := [group for group in args.groups if group not in GROUPS]:
        parser.error(f"unknown group {unknown[0]}; choose from {', '.join(GROUPS)}")
    if not run(args.groups or list(GROUPS), args.workers):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
