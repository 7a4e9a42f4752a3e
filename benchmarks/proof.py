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
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from mmmamba.conversion.distillation.recipe import RECIPES


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
    "count": {f"count-{count}": ("shapes-hybrid", [*short(1, 2, 3), f"num_attention={count}"]) for count in (1, 3, 4)},
}


def folder_of(name: str, seed: int) -> Path:
    return FOLDER / f"{name}-{seed}"


def scores(name: str, seed: int) -> dict | None:
    """An experiment's scores, if it is finished."""
    file = folder_of(name, seed) / "results.json"
    return json.loads(file.read_text(encoding="utf-8")).get("scores") if file.is_file() else None


def run_one(name: str, recipe: str, overrides: list[str], seed: int) -> None:
    """Runs an experiment in a process of its own with one thread."""
    if scores(name, seed) is not None:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmmamba", "distill", str(RECIPES / f"{recipe}.yaml"), *overrides]
    command += [f"seed={seed}", f"output={folder_of(name, seed)}", f"teacher={TEACHER}", "workers=0"]
    with (FOLDER / f"{name}-{seed}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    print(f"{name} {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def run(groups: list[str], workers: int) -> None:
    """Runs groups of experiments, first seeds first."""
    with ThreadPoolExecutor(workers) as pool:
        for seed in SEEDS:
            for group in groups:
                for name, (recipe, overrides) in GROUPS[group].items():
                    pool.submit(run_one, name, recipe, overrides, seed)


def summary() -> dict:
    """Scores by experiment: those of each seed, mean and standard deviation; in percent."""
    found = {}
    for group, experiments in GROUPS.items():
        for name in experiments:
            results = {seed: scores(name, seed) for seed in SEEDS}
            totals = [100 * one["total"]["exact"] for one in results.values() if one]
            if not totals:
                continue
            kinds = [one["kinds"] for one in results.values() if one]
            found[name] = {
                "group": group,
                "seeds": totals,
                "mean": statistics.mean(totals),
                "spread": statistics.stdev(totals) if len(totals) > 1 else 0.0,
                "kinds": {kind: statistics.mean(100 * one[kind]["exact"] for one in kinds) for kind in kinds[0]},
            }
    return found


def report(file: Path) -> None:
    """Writes the summary as JSON and prints it as tables."""
    found = summary()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "machine": machine, "experiments": found}
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if found:
        plot(found, file.with_suffix(".png"))
    for name, one in found.items():
        each = ", ".join(f"{value:.1f}" for value in one["seeds"])
        print(f"{name:32} {one['mean']:6.1f} ± {one['spread']:4.1f}   ({each})")


def plot(found: dict, file: Path) -> None:
    """Draws each group's means with their spread."""
    from matplotlib.figure import Figure

    groups = [group for group in GROUPS if any(one["group"] == group for one in found.values())]
    figure = Figure(figsize=(4 * len(groups), 4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        ones = {name.removeprefix(f"{group}-"): one for name, one in found.items() if one["group"] == group}
        axes.bar(
            list(ones),
            [one["mean"] for one in ones.values()],
            yerr=[one["spread"] for one in ones.values()],
            capsize=4,
        )
        axes.set(title=group, ylim=(0, 102))
        axes.tick_params(axis="x", rotation=45)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("exact match (%)")
    figure.savefig(file, dpi=120)


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
    run(args.groups or list(GROUPS), args.workers)


if __name__ == "__main__":
    main()
