"""Scores a model on held-out pictures: exact match of generated answers, by kind of question.

    mmmamba evaluate --model examples/shapes/hybrid

Besides the score it prints the share of each kind's most frequent answer, which is the score of guessing, and the
score with pictures shuffled among the questions of a kind, which should be no better.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from mmmamba.cli.load import load_model
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import check_model_folder
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .folder import TOKENS_PER_TILE, make_processor
from .world import KINDS, TILE, Example, example


def check_is_shapes_model(folder: str | Path) -> None:
    """Raises ValueError if a model folder has another vocabulary or other tiles than the picture world's models."""
    check_model_folder(folder)
    config, tokenizer = MmMambaConfig.from_pretrained(folder), make_processor().tokenizer
    vision = config.vision_config
    if vision is None:
        raise ValueError(
            f"{folder} reads text only, and the picture world asks about pictures; score it with "
            "lm-evaluation-harness (docs/distill.md), or give one that reads pictures (evaluate=0 leaves it out of a "
            "recipe)."
        )
    found = (config.text_config.vocab_size, vision.image_size, vision.tokens_per_tile)
    expected = (len(tokenizer), TILE, TOKENS_PER_TILE)
    if found != expected:
        raise ValueError(
            f"{folder} was not made for the picture world: it has {found[0]} tokens and tiles of {found[1]} pixels in "
            f"{found[2]} tokens, not {expected[0]}, {expected[1]} and {expected[2]}; give a model seeded from "
            "the picture world's teacher (evaluate=0 leaves it out of a recipe)."
        )


def answers(
    model: MmMambaForConditionalGeneration, examples: list[Example], batch_size: int = 100, title: str = ""
) -> list[str]:
    """Greedy answers to the examples, in their order; `title` labels the progress bar."""
    processor = make_processor()
    replies = [""] * len(examples)
    # Batches of similar length: sorted by number of pictures, then by their tiles.
    order = sorted(range(len(examples)), key=lambda i: [p.grid for p in examples[i].pictures])
    for start in tqdm(range(0, len(order), batch_size), desc=title, leave=False):
        rows = order[start : start + batch_size]
        tiles, counts = [], []
        for i in rows:
            vision = processor.image_processor([p.draw() for p in examples[i].pictures], return_tensors="pt")
            tiles.append(vision["pixel_values"])
            counts.append(vision["num_patches"].tolist())
        questions = ["<image>" * len(examples[i].pictures) + "\n" + examples[i].question for i in rows]
        options = {"max_new_tokens": 48, "do_sample": False}
        batch = model.batch_chat(processor.tokenizer, torch.cat(tiles), questions, options, num_patches_list=counts)
        for i, reply in zip(rows, batch, strict=True):
            replies[i] = reply
    return replies


def shuffled(examples: list[Example]) -> list[Example]:
    """The same questions with the pictures of another question of the same kind and number of pictures."""
    groups = defaultdict(list)
    for i, one in enumerate(examples):
        groups[one.kind, len(one.pictures)].append(i)
    swapped = list(examples)
    for group in groups.values():
        for i, j in zip(group, group[1:] + group[:1], strict=True):
            swapped[i] = examples[i]._replace(pictures=examples[j].pictures)
    return swapped


def evaluate(folder: str | Path, num_questions: int = 2000, seed: int = 0, batch_size: int = 100) -> dict:
    """Scores a model folder of the picture world.

    Args:
        folder: Model folder.
        num_questions: How many held-out questions, equally many of each kind.
        seed: Of the questions.
        batch_size: Questions answered at once.

    Returns:
        `{"questions": n, "total": row, "kinds": {kind: row}}` with rows of `share`, `exact`, `shuffled`, `majority`,
        all between 0 and 1.

    Raises:
        ValueError: if the folder is no model of the picture world.
    """
    check_is_shapes_model(folder)
    on_gpu = torch.cuda.is_available()
    model = load_model(folder, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
    examples = [example("test", seed, index) for index in range(num_questions)]
    replies = {
        "exact": answers(model, examples, batch_size, "answering"),
        "shuffled": answers(model, shuffled(examples), batch_size, "answering without the right picture"),
    }

    def row(indices: list[int]) -> dict[str, float]:
        count = len(indices)
        scores = {name: sum(r[i] == examples[i].answer for i in indices) / count for name, r in replies.items()}
        by_kind = defaultdict(Counter)
        for i in indices:
            by_kind[examples[i].kind][examples[i].answer] += 1
        majority = sum(counter.most_common(1)[0][1] for counter in by_kind.values()) / count
        return {"share": count / len(examples), **scores, "majority": majority}

    kinds = {kind: [i for i, one in enumerate(examples) if one.kind == kind] for kind in KINDS}
    return {
        "questions": len(examples),
        "total": row(list(range(len(examples)))),
        "kinds": {kind: row(indices) for kind, indices in kinds.items() if indices},
    }


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba evaluate`. Raises ValueError for a folder that is not a model of the picture world."""
    if args.questions < 1:
        raise ValueError(f"--questions {args.questions} is no number of questions; give 1 or more.")
    result = evaluate(args.model, args.questions, args.seed)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['questions']} held-out questions, exact match of generated answers, in percent\n")
    print(f"{'kind':10} {'share':>6} {'exact':>6} {'shuffled pictures':>18} {'commonest answer':>17}")
    for kind, values in [*result["kinds"].items(), ("all", result["total"])]:
        percent = {name: 100 * value for name, value in values.items()}
        print(
            f"{kind:10} {percent['share']:6.1f} {percent['exact']:6.1f} {percent['shuffled']:18.1f} "
            f"{percent['majority']:17.1f}"
        )
