"""The folder of a run: where its files are, what is finished, and whether a recipe may go on in it.

    runs/mine/recipe.yaml       the recipe, with every value
    runs/mine/seeded/           the seeded student
    runs/mine/stage-1/model/    the student after stage 1; beside it checkpoints/, logs/ (TensorBoard), loss.png,
                                history.json and, if conversations could not be read, bad_rows.jsonl
    runs/mine/placed/           after a measured placement: the student whose costliest layers are attention again
    runs/mine/model/            the finished student
    runs/mine/results.json      losses, times, tokens and scores

Every model folder appears at once and complete. So a step is finished if its model folder exists, and a run that was
stopped anywhere can go on.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from mmmamba.conversion.publish import remove_partial_folders
from mmmamba.conversion.shards import read_json, write_json

from .changes import SEEDING_KEYS, changed_keys, moved_paths, with_absolute_paths
from .checkpoints import MARKER, from_main_process
from .lock import ProcessLock, is_lock_file, left_behind
from .recipe import STAGES, Recipe, dump_recipe, load_recipe


class RunFolder:
    """Paths and state of a run.

    Args:
        path: The folder, which need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.results_file = self.path / "results.json"
        self.seeded, self.placed, self.model = (self.path / name for name in ("seeded", "placed", "model"))

    def stage(self, number: int) -> Path:
        """The folder of a stage."""
        return self.path / f"stage-{number}"

    def stage_model(self, number: int) -> Path:
        """The student after a stage."""
        return self.stage(number) / "model"

    # --- state ---------------------------------------------------------------------------------------------------

    def is_finished(self, number: int) -> bool:
        """Whether a stage has its model."""
        return self.stage_model(number).is_dir()

    def begun_stages(self) -> list[int]:
        """Stages that have a model, or a checkpoint to resume from."""
        checkpoint = f"checkpoints/checkpoint-*/{MARKER}"
        return [n for n in STAGES if self.is_finished(n) or any(self.stage(n).glob(checkpoint))]

    def has(self, folder: Path, description: str) -> bool:
        """Whether a step's model folder exists, the same on every process; says so if it does."""
        exists = from_main_process(folder.is_dir())
        if exists and PartialState().is_main_process:
            print(f"{description} exists: {folder}")
        return exists

    def check_order(self, number: int) -> None:
        """Refuses to train a stage after later ones: their models would not contain what it learns.

        Raises:
            ValueError: naming what exists of later steps.
        """
        later = [f"stage-{n}" for n in self.begun_stages() if n > number]
        later += [folder.name for folder in ([self.placed] * (number < 3) + [self.model]) if folder.is_dir()]
        if later:
            names = ", ".join(later)
            raise ValueError(
                f"{self.path} has no finished stage {number} but {names}, made without it; remove {names} to train "
                "it first, or go on with later steps one by one (--only)."
            )

    def student_before(self, number: int, placed: bool = False) -> Path:
        """The newest student that a stage can start from, the same on every process; warns if a stage is missing.

        Args:
            number: Of the stage.
            placed: Whether stage 3 and later ones start from the measured placement, if that exists.

        Raises:
            ValueError: if there is none.
        """
        candidates = [(f"stage {n}", self.stage_model(n), n) for n in range(number - 1, 0, -1)]
        if placed and number > 2:
            candidates.insert(number - 3, ("the placement", self.placed, 2))
        candidates.append(("the seeded student", self.seeded, 0))
        found = from_main_process([i for i, (_, folder, _) in enumerate(candidates) if folder.is_dir()])
        if not found:
            raise ValueError(
                f"{self.path} has no seeded student to start from; run the recipe with its seeding first."
            )
        description, folder, last_stage = candidates[found[0]]
        if last_stage < number - 1 and PartialState().is_main_process:
            missing = " and ".join(str(n) for n in range(last_stage + 1, number))
            print(f"WARNING: stage {number} starts from {description}, without stage {missing} before it.")
        return folder

    # --- files ---------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """The content of results.json, empty if there is none."""
        return read_json(self.results_file) if self.results_file.is_file() else {}

    def record(self, key: str, value: Any) -> None:
        """Sets one entry of results.json; None removes it."""
        results = self.results() | {key: value}
        write_json(self.results_file, {key: value for key, value in results.items() if value is not None})

    def remove(self, *paths: Path) -> None:
        """Removes files and folders if they exist, on the main process."""
        for path in paths if PartialState().is_main_process else ():
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)

    # --- claiming ------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, recipe: Recipe) -> Iterator[None]:
        """Makes the folder this recipe's, and no other launch's, for the length of a `with` block.

        Raises:
            ValueError: if another launch is running in it, or it holds a run with another recipe.
            FileExistsError: if it is no run's folder.
            FileNotFoundError: if not all processes share it.
        """
        process, problem = PartialState(), None
        if process.is_main_process:
            problem = self._check_is_run()
            if problem is None:
                self.path.mkdir(parents=True, exist_ok=True)
        if problem := from_main_process(problem):
            raise FileExistsError(problem)
        lock = self._lock(process.process_index, process.num_processes)
        try:
            # Only now: what another launch is writing is not to be removed.
            if process.is_main_process:
                problem = self._check_recipe(recipe)
                if problem is None:
                    dump_recipe(with_absolute_paths(recipe), self.recipe_file)
                    remove_partial_folders(self.path)
            if problem := from_main_process(problem):
                raise ValueError(problem)
            if not all(gather_object([self.recipe_file.is_file()])):
                raise FileNotFoundError(
                    f"Not every process sees {self.recipe_file}, which the first one wrote; give an output=FOLDER "
                    "that all machines share."
                )
            yield
        finally:
            lock.release()

    def _lock(self, rank: int, num_processes: int) -> ProcessLock:
        """This process's lock, taken; a ValueError on all processes if one of them cannot take its own."""
        lock, holder = ProcessLock(self.path, rank), None
        if self.path.is_dir():  # if not, the machines do not share it, which `claim` reports
            holder = lock.acquire()
            if holder is None and rank == 0:
                holder = left_behind(self.path, num_processes)
        holder = next(filter(None, gather_object([holder])), None)
        if holder is not None:
            lock.release()
            raise ValueError(
                f"Another start is running in {self.path}: {holder}; wait for it or end it, or give another "
                "output=FOLDER."
            )
        if rank == 0 and not lock.sees_other_machines:
            print(
                f"WARNING: the file system of {self.path} has no locks, so a second start on another machine would "
                "not be noticed."
            )
        return lock

    def _check_is_run(self) -> str | None:
        if self.recipe_file.is_file() or not self.path.is_dir():
            return None
        files = [file.name for file in self.path.iterdir()]
        if all(name == ".recipe.yaml.new" or is_lock_file(name) for name in files):
            return None
        return f"{self.path} exists and is no run; give another output=FOLDER."

    def _check_recipe(self, recipe: Recipe) -> str | None:
        """What is wrong with going on here with this recipe; None if nothing is."""
        if not self.recipe_file.is_file():
            return None
        try:
            recorded = load_recipe(self.recipe_file)
        except ValueError as error:  # raised here, it would leave the other processes waiting
            return f"{self.recipe_file}: {error}"
        changed = changed_keys(recorded, recipe, ignore=self._unused_keys())
        if not changed:
            if self.seeded.is_dir():
                for before, now in moved_paths(recorded, recipe).items():
                    print(f"WARNING: {before} is gone, so {now} is taken for the same; make sure that it is.")
            return None
        again = f"remove {self.path} to start anew"
        stages = {key.split(".")[0].replace("_", "-") for key in changed}
        if all(name.startswith("stage-") for name in stages) and not self.model.is_dir():
            first = min(int(name[-1]) for name in stages)
            made = [f"{self.path / f'stage-{n}'}" for n in self.begun_stages() if n >= first]
            made += [str(self.placed)] * (first < 3 and self.placed.is_dir())
            again = f"remove {' and '.join(made)} to train from stage {first} on again"
        return (
            f"{self.path} holds a run with another {', '.join(changed)}; give another output=FOLDER, set "
            f"{'it' if len(changed) == 1 else 'them'} as in {self.recipe_file}, or {again}."
        )

    def _unused_keys(self) -> set[str]:
        """Keys that nothing depends on yet. After running out of memory at once, a stage may get other settings."""
        if self.model.is_dir():
            return set()
        begun = self.begun_stages()
        if not begun and not self.placed.is_dir():
            keys = {entry.name for entry in fields(Recipe)}
            return keys - SEEDING_KEYS if self.seeded.is_dir() else keys
        unused = {"stages", *(f"stage_{number}" for number in STAGES if number not in begun)}
        return unused if self.placed.is_dir() else unused | {"held_out", "measure_batches"}
