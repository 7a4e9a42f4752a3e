"""Experiments of `mmmamba distill`: run and scored one per CPU core or on a GPU, resumed, and averaged over seeds.

A script says what its experiments are and calls `Experiments.main`, which has the commands `run`, `score` and
`report`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from mmmamba.benchmarks.timing import processor_name
from mmmamba.conversion.shards import write_text


Tables = dict[str, dict[str, dict]]
LEARNING_RATES = {1: 2e-3, 2: 1e-3, 3: 5e-4, 4: 1e-4}
SHARES = {1: 2, 2: 4, 3: 6, 4: 3}  # of a budget


def stages(*numbers: int, budget: int, batch_size: int) -> list[str]:
    """Overrides of a recipe for these stages, which share the budget.

    Args:
        numbers: Of the stages.
        budget: Steps of all of them together.
        batch_size: Rows or conversations of a step.
    """
    overrides = [f"stages={list(numbers)}"]
    for number in numbers:
        steps = budget * SHARES[number] // sum(SHARES[number] for number in numbers)
        values = {"steps": steps, "warmup": max(1, steps // 10), "decay": steps // 3, "min_lr_ratio": 0.02}
        values |= {"batch_size": batch_size, "per_device_batch_size": batch_size}
        values |= {"learning_rate": LEARNING_RATES[number]}
        overrides += [f"stage_{number}.{key}={value}" for key, value in values.items()]
    return overrides


@dataclass(frozen=True)
class Experiments:
    """Students of one teacher.

    Args:
        script: Whose command line `main` is.
        recipe: Of all students.
        folder: Where `teacher/`, data and runs are.
        groups: By group and name, overrides of the recipe.
        tables: Of the report: by table and label, the experiment, which may stand in several; "teacher" is one.
        measures: By name, what a table shows of an experiment's scores.
        prepare: Makes the teacher and the data in the folder.
        score: Scores of a model folder.
        show: Prints and plots what the report has beside its tables; it is given them and the report's file.
        for_gpus: Groups that take many hours on CPUs, which run there only if they are named.
    """

    script: Path
    recipe: Path
    folder: Path
    groups: dict[str, dict[str, list[str]]]
    tables: dict[str, dict[str, str]]
    measures: dict[str, Callable[[dict], float]]
    prepare: Callable[[Path], None]
    score: Callable[[Path], dict]
    show: Callable[[Tables, Path], None]
    for_gpus: tuple[str, ...] = ()

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / ("teacher" if name == "teacher" else f"{name}-{seed}")

    def scores_file(self, name: str, seed: int) -> Path:
        return self.folder / "scores" / f"{self.run_folder(name, seed).name}.json"

    def overrides(self, name: str) -> list[str]:
        """An experiment's; none are the teacher's."""
        return {name: overrides for group in self.groups.values() for name, overrides in group.items()}.get(name, [])

    def read_scores(self, name: str, seed: int) -> dict | None:
        """An experiment's scores, None if it is not finished.

        Raises:
            ValueError: if it was another experiment when it was run.
        """
        file = self.scores_file(name, seed)
        if not file.is_file():
            return None
        scores = json.loads(file.read_text(encoding="utf-8"))
        if scores["overrides"] != self.overrides(name):
            folder = self.run_folder(name, seed)
            raise ValueError(f"{file} is of {scores['overrides']}; remove it and {folder} to run it again.")
        return scores

    def run_one(self, name: str, seed: int) -> bool:
        """Runs and scores an experiment, unless it is finished, in subprocesses of one thread; returns its success.

        Of a finished run the student, its recipe, losses and results stay; the models before it do not.
        """
        if self.read_scores(name, seed) is not None:
            return True
        folder, python = self.run_folder(name, seed), sys.executable
        overrides = [*self.overrides(name), f"seed={seed}", f"output={folder}"]
        distill = [python, "-m", "mmmamba", "distill", str(self.recipe), *overrides]
        score = [python, str(self.script), "score", name, str(seed)]
        with (self.folder / f"{folder.name}.log").open("a", encoding="utf-8") as log:
            environment = os.environ if torch.cuda.is_available() else os.environ | {"OMP_NUM_THREADS": "1"}
            done = all(
                subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode == 0
                for command in ([score] if name == "teacher" else [distill, score])
            )
        if done and name != "teacher":
            for intermediate in (folder / "seeded", folder / "placed", *folder.glob("stage-*/model")):
                shutil.rmtree(intermediate, ignore_errors=True)
        print(f"{name} {seed}: {'done' if done else f'failed, see {log.name}'}", flush=True)
        return done

    def run(self, groups: list[str], seeds: list[int], workers: int) -> bool:
        """Runs groups of experiments, seed by seed. Returns whether all of them succeeded."""
        self.prepare(self.folder)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self.run_one, "teacher", 0)] + [
                pool.submit(self.run_one, name, seed)
                for seed in seeds
                for group in groups
                for name in self.groups[group]
            ]
        return all(job.result() for job in jobs)

    def write_scores(self, name: str, seed: int) -> None:
        """Scores a finished run."""
        folder = self.run_folder(name, seed)
        found = self.score(folder if name == "teacher" else folder / "model")
        results = {} if name == "teacher" else json.loads((folder / "results.json").read_text(encoding="utf-8"))
        tokens = sum(value["tokens"] for key, value in results.items() if key.startswith("stage_"))
        file = self.scores_file(name, seed)
        file.parent.mkdir(exist_ok=True)
        losses = {}
        for history in sorted(folder.glob("stage-*/history.json")):
            entries = json.loads(history.read_text(encoding="utf-8"))["history"]
            losses[history.parent.name] = [entry["loss"] for entry in entries if "loss" in entry]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
        found |= {"trained tokens": tokens, "overrides": self.overrides(name), "losses": losses, "device": device}
        write_text(file, json.dumps(found, indent=1) + "\n")

    def summarize(self, seeds: list[int]) -> Tables:
        """By table and row: each measure's mean over seeds, its spread where there are several, and all scores."""
        tables: Tables = {}
        for table, rows in self.tables.items():
            for label, name in rows.items():
                of_name = seeds[:1] if name == "teacher" else seeds
                by_seed = [scores for seed in of_name if (scores := self.read_scores(name, seed))]
                if not by_seed:
                    continue
                values = {
                    measure: [function(found) for found in by_seed] for measure, function in self.measures.items()
                }
                tables.setdefault(table, {})[label] = {
                    "experiment": name,
                    "seeds": len(by_seed),
                    "trained tokens": by_seed[0]["trained tokens"],
                    "device": by_seed[0].get("device", "a CPU"),
                    "mean": {measure: statistics.mean(x) for measure, x in values.items()},
                    "spread": {measure: statistics.stdev(x) if len(x) > 1 else None for measure, x in values.items()},
                    "scores": by_seed[0],
                }
        return tables

    def report(self, file: Path, seeds: list[int]) -> None:
        """Writes the summary as JSON, prints it as Markdown tables, and shows the rest."""
        tables = self.summarize(seeds)
        if not tables:
            raise SystemExit("No experiment is finished; start some with `run`.")
        file.parent.mkdir(parents=True, exist_ok=True)
        machine = {"date": date.today().isoformat(), "processor": processor_name(), "cores": os.cpu_count()}
        write_text(file, json.dumps(machine | {"tables": tables}, indent=1) + "\n")
        for table, rows in tables.items():
            titles = [table, *self.measures, "seeds", "trained tokens"]
            print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
            for label, row in rows.items():
                cells = [
                    f"{row['mean'][x]:.3g}" + ("" if row["spread"][x] is None else f" ± {row['spread'][x]:.2g}")
                    for x in self.measures
                ]
                seeds_used = f"{row['seeds']}" if row["seeds"] > 1 or label == "teacher" else "1, spread unknown"
                print(f"| {label} | {' | '.join(cells)} | {seeds_used} | {row['trained tokens']:,} |")
        if len(devices := {row["device"] for rows in tables.values() for row in rows.values()}) > 1:
            print("\nMeasured on several devices, which the JSON names by row: " + ", ".join(sorted(devices)) + ".")
        self.show(tables, file)

    def main(self, description: str, results: Path) -> None:
        """The script's command line.

        Args:
            description: Of the script.
            results: The report's JSON file, if no other is named.
        """
        parser = argparse.ArgumentParser(description=description)
        commands = parser.add_subparsers(dest="command", required=True)
        run_parser = commands.add_parser("run", help="fetch, run experiments and score them")
        groups = ", ".join(self.groups)
        default = [group for group in self.groups if torch.cuda.is_available() or group not in self.for_gpus]
        run_parser.add_argument(
            "groups", nargs="*", metavar="GROUP", help=f"of {groups} (default here: {', '.join(default)})"
        )
        workers = 1 if torch.cuda.is_available() else os.cpu_count()
        run_parser.add_argument("--workers", type=int, default=workers, help="experiments at once")
        score_parser = commands.add_parser("score", help="score one finished experiment (done by `run`)")
        score_parser.add_argument("name")
        score_parser.add_argument("seed", type=int)
        report_parser = commands.add_parser("report", help="tables and plots of the finished experiments")
        report_parser.add_argument("--json", type=Path, default=results)
        for with_seeds in (run_parser, report_parser):
            with_seeds.add_argument("--seeds", type=int, nargs="+", default=[0])
        args = parser.parse_args()
        if args.command == "score":
            self.write_scores(args.name, args.seed)
        elif args.command == "report":
            self.report(args.json, args.seeds)
        else:
            if unknown := [group for group in args.groups if group not in self.groups]:
                parser.error(f"unknown group {unknown[0]}; choose from {groups}")
            if not self.run(args.groups or default, args.seeds, args.workers):
                raise SystemExit(1)
