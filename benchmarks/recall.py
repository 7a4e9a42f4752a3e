"""Recall by length: a list gives n names a word each, n = 4 … 256, and one of them is asked for.

    python benchmarks/recall.py run      # trains a teacher on it, distils students with 0, 2 and 3 attention layers
    python benchmarks/recall.py report   # scores them; writes JSON and a plot

The teacher has the architecture of the picture world's and learns recall alone; students are distilled from it with
the package's recipes on lists of 4 to 256 names. Scores are exact matches of generated answers to held-out questions.
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

import torch
from transformers import set_seed

from mmmamba.benchmarks.timing import processor_name
from mmmamba.conversion.distillation.data import pad
from mmmamba.examples.shapes.folder import make_processor, save
from mmmamba.examples.shapes.recall import RecallConversations, recall, single_token_names
from mmmamba.examples.shapes.train import config
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


FOLDER = Path("runs/recall")
SEEDS = (0, 1, 2)
ATTENTION = {"linear": 0, "hybrid-2": 2, "hybrid-3": 3}  # layers of six that the students keep
ITEMS = (4, 8, 16, 32, 64, 128, 256)  # names in a list
BATCH_SIZE = 32  # the students' is half of it
MICRO_BATCH_SIZE = 8
TARGET_ACCURACY = 0.95  # on the answers' tokens; then the longest list doubles
MAX_STEPS, DECAY = 1000, 150  # steps at most per longest list; steps of learning rate decay at the end
SCHEDULES = {"stage_1": 50, "stage_2": 100, "stage_3": 500}  # the students' steps


def train_teacher() -> None:
    """Trains an all-attention model from scratch on recall alone.

    A curriculum, since long lists of many names give a model that cannot look up yet no signal: lists of at most eight
    names of ten, doubled whenever answers come right. Lookup is learned sooner with query weights initialised to the
    key weights, so that a token attends to its like, and with Muon (torch 2.9).
    """
    folder = FOLDER / "teacher"
    if folder.is_dir():
        return
    set_seed(0)
    processor = make_processor()
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|im_end|>"])
    model = MmMambaForConditionalGeneration._from_config(config(len(tokenizer), *ids), dtype=torch.float32)
    for layer in model.model.layers:
        attention = layer.self_attn
        keys = attention.k_proj.weight.detach().unflatten(0, (-1, attention.head_dim))
        attention.q_proj.weight.data.copy_(keys.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1))
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    matrix_ids = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in matrix_ids]
    rates = {
        torch.optim.Muon(matrices, weight_decay=0.05): 0.02,
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.05): 2e-3,
    }

    def train_step(rows: RecallConversations, index: int, lr_scale: float) -> float:
        """One step on batch `index` at scaled learning rates; returns the accuracy on the answers' tokens."""
        accuracies = []
        for start in range(index * BATCH_SIZE, (index + 1) * BATCH_SIZE, MICRO_BATCH_SIZE):
            batch = pad([rows[i] for i in range(start, start + MICRO_BATCH_SIZE)], tokenizer.pad_token_id)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**batch)
            (output.loss * MICRO_BATCH_SIZE / BATCH_SIZE).backward()
            labels = batch["labels"][:, 1:]
            accuracies.append((output.logits[:, :-1].argmax(-1) == labels)[labels != -100].float().mean().item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_scale
            optimizer.step()
            optimizer.zero_grad()
        return statistics.mean(accuracies)

    steps = 0
    for max_names in ITEMS[1:]:
        vocabulary = max_names * 5 // 4 if max_names < ITEMS[-1] else None
        rows, accuracies = RecallConversations(processor, 100 + max_names, BATCH_SIZE, max_names, vocabulary), []
        while len(accuracies) < MAX_STEPS and (
            len(accuracies) < 20 or statistics.mean(accuracies[-20:]) < TARGET_ACCURACY
        ):
            accuracies.append(train_step(rows, len(accuracies), min(1.0, (steps + 1) / 50)))
            steps += 1
            if steps % 50 == 0:
                accuracy = statistics.mean(accuracies[-20:])
                print(f"step {steps}: up to {max_names} names, {accuracy:.1%} right", flush=True)
    for step in range(DECAY):
        accuracies.append(train_step(rows, len(accuracies), 1 - step / DECAY))
    print(f"at the end: {statistics.mean(accuracies[-20:]):.1%} right", flush=True)
    save(model, folder, "shapes-recall-teacher", f"Trained from scratch on recall, {steps + DECAY:,} steps.")


def distill_student(job: tuple[str, int]) -> None:
    """Distils one student, (kind, seed), in a subprocess."""
    kind, seed = job
    folder = FOLDER / f"{kind}-{seed}"
    if (folder / "model").is_dir():
        return
    recipe = "shapes-hybrid" if ATTENTION[kind] else "shapes-linear"
    command = [sys.executable, "-m", "mmmamba", "distill", recipe, "data=[{shapes: recall}]", "evaluate=0"]
    command += [f"teacher={FOLDER / 'teacher'}", f"output={folder}", f"seed={seed}", "workers=0"]
    if ATTENTION[kind]:
        command += [f"num_attention={ATTENTION[kind]}", "strategy=measured"]
    for stage, steps in SCHEDULES.items():
        values = {"steps": steps, "warmup": steps // 10, "decay": steps // 4}
        values |= {"batch_size": BATCH_SIZE // 2, "per_device_batch_size": MICRO_BATCH_SIZE}
        command += [f"{stage}.{key}={value}" for key, value in values.items()]
    with (FOLDER / f"{kind}-{seed}.log").open("a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def score(folder: Path, questions: int) -> dict[int, float]:
    """Accuracy by number of names."""
    model = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = make_processor().tokenizer
    names, accuracies = single_token_names(tokenizer), {}
    for items in ITEMS:
        examples = [recall(names, 10**6, index, items) for index in range(questions)]
        right = 0
        for start in range(0, questions, 25):
            batch = examples[start : start + 25]
            prompts = [f"{example.listing}\n{example.turns[0][0]}" for example in batch]
            answers = model.batch_chat(tokenizer, None, prompts, {"max_new_tokens": 10, "do_sample": False})
            expected = [example.turns[0][1].strip() for example in batch]
            right += sum(answer.strip() == truth for answer, truth in zip(answers, expected, strict=True))
        accuracies[items] = right / questions
    return accuracies


def report(file: Path, questions: int) -> None:
    """Scores every finished model, writes JSON and a plot, prints a Markdown table."""
    from matplotlib.figure import Figure

    folders = {"teacher": [FOLDER / "teacher"]}
    for kind in ATTENTION:
        folders[kind] = [FOLDER / f"{kind}-{seed}" / "model" for seed in SEEDS]
    finished = {kind: [folder for folder in paths if folder.is_dir()] for kind, paths in folders.items()}
    scores = {kind: [score(folder, questions) for folder in paths] for kind, paths in finished.items() if paths}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print(f"| names | {' | '.join(map(str, ITEMS))} |\n|---|{'---|' * len(ITEMS)}")
    for kind, results in scores.items():
        percent = [[100 * accuracies[items] for accuracies in results] for items in ITEMS]
        means = [statistics.mean(seeds) for seeds in percent]
        spreads = [statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in percent]
        axes.errorbar(ITEMS, means, spreads, marker="o", capsize=3, label=kind)
        cells = [f"{m:.1f}" + f" ± {s:.1f}" * (len(results) > 1) for m, s in zip(means, spreads, strict=True)]
        print(f"| {kind} | {' | '.join(cells)} |")
    axes.set(
        xscale="log",
        xticks=ITEMS,
        xticklabels=ITEMS,
        xlabel="names",
        ylabel="exact match (%)",
        ylim=(0, 102),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file.with_suffix(".png"), dpi=120)
    result = {"date": date.today().isoformat(), "processor": processor_name(), "cores": os.cpu_count()}
    result |= {"questions": questions, "scores": scores}
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--questions", type=int, default=300, help="per number of names")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="students at once")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recall.json"))
    args = parser.parse_args()
    if args.command == "report":
        report(args.json, args.questions)
        return
    train_teacher()
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(distill_student, [(kind, seed) for seed in SEEDS for kind in ATTENTION]))


if __name__ == "__main__":
    main()
