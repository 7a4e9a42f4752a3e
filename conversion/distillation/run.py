"""`mmmamba distill`: runs a recipe, or resumes it where it stopped. What a run leaves is described in `folder`."""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from .cost import cost_table, stage_costs
from .data.check import check_data
from .data.training_data import TrainingData
from .folder import RunFolder
from .memory import memory_table
from .recipe import STAGES, Recipe, load_recipe, resolve_path
from .stages import Run, export, load_teacher_config, place, seed, train


STEPS = ("seed", *map(str, STAGES), "export")


def distill(recipe: Recipe, only: str | None = None) -> Path:
    """Runs a recipe, or resumes it where it stopped.

    Args:
        recipe: See `load_recipe`.
        only: One of `STEPS`, to run it alone.

    Returns:
        The run's folder.

    Raises:
        ValueError: for whatever is wrong with the recipe, the teacher, the data or the folder, in one sentence.
        OSError: if a file is missing, or the folder is no run's.
    """
    run = Run(recipe)
    steps = STEPS if only is None else (only,)
    stages = [n for n in STAGES if str(n) in steps and (only is not None or n in recipe.stages)]
    with run.folder.claim(recipe), _quiet_unless(run.is_main):
        if not all(run.folder.is_finished(number) for number in stages):
            run.data.check()
        if "seed" in steps:
            seed(run)
        for number in stages:
            if number == 3 and recipe.strategy == "measured":
                place(run)
            train(run, number)
        if "export" in steps:
            export(run)
    return run.folder.path


@contextmanager
def _quiet_unless(is_main: bool) -> Iterator[None]:
    """Leaves warnings, which all processes have alike, to the main one."""
    if is_main:
        yield
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba distill`."""
    logging.disable_progress_bar()  # of loading weights; training has its own
    recipe = load_recipe(args.recipe, args.overrides)
    if args.cost is not None:
        if args.cost < 1:
            raise ValueError(f"--cost {args.cost} is no number of tokens per conversation; give 1 or more.")
        config = load_teacher_config(recipe)
        print(cost_table(stage_costs(recipe, config, args.cost), args.cost))
        print(f"\n{memory_table(recipe, config)}")
        return
    if args.check_data is not None:
        print(*_check_data(recipe, args.check_data), sep="\n\n")
        return
    folder = RunFolder(distill(recipe, args.only))
    if PartialState().is_main_process:
        for key, value in folder.results().items():
            if key.startswith("stage_") and value["loss"] is not None:
                print(f"{key.replace('_', ' ')}: loss {value['loss']:.4g} after {value['tokens']:,} tokens")


def _check_data(recipe: Recipe, num_rows: int) -> Iterator[str]:
    """Reads rows as the first stage does, and as stage 4 does if it has data of its own.

    Needs the teacher's tokenizer and configuration, but not its weights.
    """
    if not recipe.stages:
        raise ValueError("stages=[] reads no data; name the stages whose data to check.")
    load_teacher_config(recipe)
    data, first = TrainingData(recipe, resolve_path(recipe.teacher)), recipe.stages[0]
    numbers = [first] + [4] * (4 in recipe.stages[1:] and recipe.stage_data(4) != recipe.stage_data(first))
    for number in numbers:
        report = check_data(data.for_stage(number), num_rows, recipe.seed, recipe.workers, recipe.bad_share)
        yield f"stage {number}\n{report}" if len(numbers) > 1 else str(report)
