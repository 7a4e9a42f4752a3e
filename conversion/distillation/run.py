"""`mmmamba distill`: runs a recipe, or resumes it where it stopped. What a run leaves is described in `folder`."""

import argparse
from pathlib import Path

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from .cost import cost_table, stage_costs
from .folder import RunFolder
from .recipe import STAGES, Recipe, load_recipe
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
    with run.folder.claim(recipe):
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


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba distill`."""
    disable_progress_bar()  # of loading weights; training has its own
    recipe = load_recipe(args.recipe, args.overrides)
    if args.cost is not None:
        if args.cost < 1:
            raise ValueError(f"--cost {args.cost} is no number of tokens per conversation; give 1 or more.")
        print(cost_table(stage_costs(recipe, load_teacher_config(recipe), args.cost), args.cost))
        return
    folder = RunFolder(distill(recipe, args.only))
    if PartialState().is_main_process:
        for key, value in folder.results().items():
            if key.startswith("stage_") and value["loss"] is not None:
                print(f"{key.replace('_', ' ')}: loss {value['loss']:.4g} after {value['tokens']:,} tokens")
