"""The model card of a finished student: what it was made from, how, and how well it answers."""

from typing import Any

from huggingface_hub import EvalResult

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import Provenance, license_of, model_card

from .data.sources import local_files
from .recipe import STAGES, Recipe, resolve_path


def student_card(name: str, config: MmMambaConfig, recipe: Recipe, results: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        name: What the student is called.
        config: The student's.
        recipe: Names the teacher, the base model and the data.
        results: The content of results.json: what each stage did, and scores if there are any.
    """
    stages = {n: results[f"stage_{n}"] for n in STAGES if f"stage_{n}" in results}
    training = [f"stage {n}: {stage['steps']:,} steps, {stage['tokens']:,} tokens" for n, stage in stages.items()]
    data = [*recipe.data, *(recipe.stage_data(4) if 4 in stages and recipe.stage_data(4) != recipe.data else ())]
    entries = [entry for entry in data if isinstance(entry, dict)]
    scores = results.get("scores")
    evaluation = scores and EvalResult(
        task_type="image-text-to-text",
        dataset_type="shapes",
        dataset_name=f"{scores['questions']} held-out questions of the shapes picture world",
        metric_type="exact_match",
        metric_value=round(scores["total"]["exact"], 4),
    )
    provenance = Provenance(
        base_model=recipe.base_model,
        origin=f"Seeded from {resolve_path(recipe.teacher).name} and distilled from it.",
        license=license_of(resolve_path(recipe.teacher)),
        datasets=[entry["dataset"] for entry in entries if "dataset" in entry and not local_files(entry)],
        files=[name for entry in entries for name in _local_data(entry)],
        results=[evaluation] if evaluation else [],
        training="; ".join(training) or None,
    )
    return model_card(name, config, provenance=provenance)


def _local_data(entry: dict[str, Any]) -> list[str]:
    """What an entry of `data` reads that is not on the Hub."""
    if "shapes" in entry:
        return ["the shapes picture world"]
    names = [str(entry[kind]) for kind in ("file", "documents") if kind in entry]
    return names or local_files(entry)
