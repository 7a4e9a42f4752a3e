"""Recall under length: how many of n things told before can each model give back, for n = 4 … 256?

    python benchmarks/recall.py run      # trains a teacher for it, distils three linear and three hybrid students
    python benchmarks/recall.py report   # scores them; writes JSON and a plot

The teacher is the picture world's, trained further on recall; the students learn from it with the package's recipes on
the same conversations, of 4 to 256 things. Scores are exact matches of generated answers to held-out questions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import set_seed

from mmmamba.examples.shapes.folder import make_processor, save
from mmmamba.examples.shapes.recall import RecallConversations, recall
from mmmamba.examples.shapes.train import fit
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


FOLDER = Path("runs/recall")
SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
SEEDS = (0, 1, 2)
ITEMS = (4, 8, 16, 32, 64, 128, 256)
BATCH_SIZE = 32
AT_ONCE = 8  # conversations that are in memory together
SCHEDULES = {"stage_1": 100, "stage_2": 200, "stage_3": 1000}  # steps; the recipes' own are for pictures


def train_teacher(steps: int) -> None:
    """Goes on with the picture world's teacher on recall alone."""
    folder = FOLDER / "teacher"
    if folder.is_dir():
        return
    set_seed(0)
    processor = make_processor()
    model = MmMambaForConditionalGeneration.from_pretrained(SHAPES / "teacher", dtype=torch.float32)
    # The largest number of things is 256 for the last half of the steps.
    rows = RecallConversations(processor, 100, BATCH_SIZE, growing=steps * BATCH_SIZE // 10)
    checkpoints, pad = FOLDER / "teacher-checkpoints", processor.tokenizer.pad_token_id
    fit(model, rows, checkpoints, steps, 2e-3, pad, parts=BATCH_SIZE // AT_ONCE)
    save(model, folder, "shapes-recall-teacher", f"The shapes teacher after {steps:,} more steps on recall.")


def distil(job: tuple[str, int]) -> None:
    """Makes one student in a process of its own."""
    kind, seed = job
    folder = FOLDER / f"{kind}-{seed}"
    if (folder / "model").is_dir():
        return
    command = [sys.executable, "-m", "mmmamba", "distill", f"shapes-{kind}", "data=[{shapes: recall}]", "evaluate=0"]
    command += [f"teacher={FOLDER / 'teacher'}", f"output={folder}", f"seed={seed}", "workers=0"]
    for stage, steps in SCHEDULES.items():
        values = {"steps": steps, "warmup": steps // 10, "decay": steps // 4}
        values |= {"batch_size": BATCH_SIZE, "per_device_batch_size": AT_ONCE}
        command += [f"{stage}.{key}={value}" for key, value in values.items()]
    with (FOLDER / f"{kind}-{seed}.log").open("a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def score(folder: Path, questions: int) -> dict[int, float]:
    """Share of right answers by number of things."""
    model = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = make_processor().tokenizer
    found = {}
    for items in ITEMS:
        examples = [recall(10**6, index, items) for index in range(questions)]
        right = 0
        for start in range(0, questions, 25):
            batch = examples[start : start + 25]
            asked = [f"{one.told}\n{one.turns[0][0]}" for one in batch]
            answers = model.batch_chat(tokenizer, None, asked, {"max_new_tokens": 10, "do_sample": False})
            right += sum(answer == one.turns[0][1] for answer, one in zip(answers, batch, strict=True))
        found[items] = right / questions
    return found


def report(file: Path, questions: int) -> None:
    """Scores every model that is there, writes JSON and a plot, prints a table."""
    from matplotlib.figure import Figure

    folders = {"teacher": [FOLDER / "teacher"]}
    for kind in ("hybrid", "linear"):
        folders[kind] = [FOLDER / f"{kind}-{seed}" / "model" for seed in SEEDS]
    scores = {
        kind: [score(folder, questions) for folder in of_kind if folder.is_dir()]
        for kind, of_kind in folders.items()
        if any(folder.is_dir() for folder in of_kind)
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print("things  " + "  ".join(f"{items:>11}" for items in ITEMS))
    for kind, results in scores.items():
        means = [100 * statistics.mean(one[items] for one in results) for items in ITEMS]
        spreads = [100 * statistics.stdev(o[i] for o in results) if len(results) > 1 else 0.0 for i in ITEMS]
        axes.errorbar(ITEMS, means, spreads, marker="o", capsize=3, label=kind)
        print(f"{kind:8}" + "  ".join(f"{m:5.1f} ± {s:3.1f}" for m, s in zip(means, spreads, strict=True)))
    axes.set(
        xscale="log", xticks=ITEMS, xticklabels=ITEMS, xlabel="things told", ylabel="exact match (%)", ylim=(0, 102)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file.with_suffix(".png"), dpi=120)
    file.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=300, help="per number of things")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="students at once")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recall.json"))
    args = parser.parse_args()
    if args.command == "report":
        report(args.json, args.questions)
        return
    train_teacher(args.teacher_steps)
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(distil, [(kind, seed) for seed in SEEDS for kind in ("linear", "hybrid")]))


if __name__ == "__main__":
    main()
