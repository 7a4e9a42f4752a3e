"""The evidence for the distillation recipe: students of the picture world, three seeds each, scored by their answers.

    python benchmarks/proof.py run                 # everything, a run per processor core; goes on where it stopped
    python benchmarks/proof.py run stages          # one group of experiments
    python benchmarks/proof.py report              # tables and plots of what is there

Every experiment is `mmmamba distill` with a recipe of the package and some overrides, so each can be repeated by hand;
`runs/proof/NAME-SEED/recipe.yaml` says how. Results come from generated answers to held-out questions.
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

from mmmamba.benchmarks.plot import bars
from mmmamba.benchmarks.timing import processor
from mmmamba.conversion.distillation.recipe import RECIPES, load_recipe, resolve_path
from mmmamba.conversion.shards import write_text


FOLDER = Path("runs/proof")
SEEDS = (0, 1, 2)
TEACHER = "mmmamba:examples/shapes/teacher"
# A short budget for the ablations: 600 steps of 16 conversations, however the stages share them. As published, the
# mixers alone learn in stage 3.
BUDGET = 600


def stage(number: int, steps: int) -> list[str]:
    """Overrides that give a stage so many steps, a tenth of them to warm up and a quarter to decay."""
    values = {
        "steps": steps,
        "warmup": steps // 10,
        "decay": steps // 4,
        "batch_size": 16,
        "per_device_batch_size": 16,
    }
    return [f"stage_{number}.{key}={value}" for key, value in values.items()]


def short(*stages: int) -> list[str]:
    """Overrides for an ablation with these stages, which share the budget 1 : 2 : 3."""
    shares = {number: BUDGET * number // sum(stages) for number in stages}
    overrides = [f"stages={list(stages)}", "stage_3.trainable=mixers", "stage_3.hard_weight=0"]
    for number, steps in shares.items():
        overrides += stage(number, steps)
    return [*overrides, "evaluate=500"]


GROUPS: dict[str, dict[str, tuple[str, list[str]]]] = {
    # Proof 1: the recipes as they are.
    "students": {"linear": ("shapes-linear", []), "hybrid": ("shapes-hybrid", [])},
    # Proof 2, arXiv 2502.13145, tables 3 and 4.
    "stages": {
        "stages-" + "".join(map(str, stages)): ("shapes-linear", short(*stages))
        for stages in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
    },
    "initialization": {
        f"initialization-{name}": ("shapes-linear", [*short(1, 2, 3), f"initialization={name}"])
        for name in ("scratch", "inherited")
    },
    # Proof 3, tables 5 and 6.
    "placement": {
        f"placement-{strategy}": ("shapes-hybrid", [*short(1, 2, 3), f"strategy={strategy}"])
        for strategy in ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked", "measured")
    },
    "count": {
        f"count-{count}": ("shapes-hybrid", [*short(1, 2, 3), f"num_attention={count}"]) for count in (1, 3, 4, 5)
    },
}
# What the report compares: some experiments belong to several tables.
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


def folder_of(name: str, seed: int) -> Path:
    return FOLDER / f"{name}-{seed}"


def scores(name: str, seed: int) -> dict | None:
    """An experiment's scores, if it is finished."""
    file = folder_of(name, seed) / "results.json"
    return json.loads(file.read_text(encoding="utf-8")).get("scores") if file.is_file() else None


def run_one(name: str, recipe: str, overrides: list[str], seed: int) -> bool:
    """Runs an experiment in a process of its own with one thread; returns whether it succeeded."""
    if scores(name, seed) is not None:
        return True
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmmamba", "distill", str(RECIPES / f"{recipe}.yaml"), *overrides]
    command += [f"seed={seed}", f"output={folder_of(name, seed)}", f"teacher={TEACHER}", "workers=0"]
    with (FOLDER / f"{name}-{seed}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    print(f"{name} {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)
    return done.returncode == 0


def run(groups: list[str], workers: int) -> bool:
    """Runs groups of experiments, first seeds first. Returns whether all of them succeeded."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run_one, name, recipe, overrides, seed)
            for seed in SEEDS
            for group in groups
            for name, (recipe, overrides) in GROUPS[group].items()
        ]
    return all(job.result() for job in jobs)


def teacher_scores() -> dict:
    """The teacher's, on the same questions as the students of the recipes."""
    file = FOLDER / "teacher.json"
    if not file.is_file():
        from mmmamba.examples.shapes.evaluate import evaluate

        scores = evaluate(resolve_path(TEACHER), load_recipe("shapes-linear").evaluate)
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(scores))
    return json.loads(file.read_text(encoding="utf-8"))


def summary() -> dict[str, dict[str, dict]]:
    """By table and row: scores of each seed, mean and standard deviation, means by kind of question; in percent."""
    teacher, found = teacher_scores(), {}
    for table, rows in TABLES.items():
        for label, name in rows.items():
            results = [teacher] if name == "teacher" else [one for seed in SEEDS if (one := scores(name, seed))]
            if not results:
                continue
            totals = [100 * one["total"]["exact"] for one in results]
            found.setdefault(table, {})[label] = {
                "experiment": name,
                "questions": results[0]["questions"],
                "seeds": totals,
                "mean": statistics.mean(totals),
                "spread": statistics.stdev(totals) if len(totals) > 1 else None,
                "kinds": {
                    kind: statistics.mean(100 * one["kinds"][kind]["exact"] for one in results)
                    for kind in results[0]["kinds"]
                },
            }
    return found


def report(file: Path) -> None:
    """Writes the summary as JSON and a plot, and prints it as tables for Markdown."""
    found = summary()
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "processor": processor(), "cores": os.cpu_count(), "tables": found}
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(found, file.with_suffix(".png"))
    for table, rows in found.items():
        print(f"\n| {table} | exact match, % | each seed |\n|---|---|---|")
        for label, one in rows.items():
            spread = "" if one["spread"] is None else f" ± {one['spread']:.1f}"
            print(f"| {label} | {one['mean']:.1f}{spread} | {', '.join(f'{value:.1f}' for value in one['seeds'])} |")
    kinds = list(found["students"]["teacher"]["kinds"])
    print(f"\n| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for label, one in found["students"].items():
        cells = [f"{one['kinds'][kind]:.1f}" for kind in kinds]
        print(f"| {label} | {' | '.join(cells)} |")


def plot(found: dict, file: Path) -> None:
    """Draws each table's means with the least and the best seed."""
    panels = {
        table: {label: (one["mean"], min(one["seeds"]), max(one["seeds"])) for label, one in rows.items()}
        for table, rows in found.items()
    }
    bars(file, panels, "exact match (%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run experiments")
    running.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    running.add_argument("--workers", type=int, default=os.cpu_count(), help="experiments at once")
    reporting = commands.add_parser("report", help="tables of what is there")
    reporting.add_argument("--json", type=Path, default=Path("benchmarks/results/distillation.json"))
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
