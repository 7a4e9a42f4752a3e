"""What a student of a language model is worth beside its teacher: on held-out text, in recall, in conversations."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is 7 times 8?",
    "Translate to French: Good morning, my friend.",
    "Give three tips for learning to cook.",
    "Who wrote Romeo and Juliet?",
    "Explain what a computer program is in one sentence.",
    "Name four animals that live in the ocean.",
    "Rewrite politely: Give me the report now.",
    "What should I pack for a winter hike?",
    "Tell me a short story about a lost key.",
)
NAMES = ("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Mary",
         "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Walter", "Yvonne", "Adam", "Beth", "Carl", "Diana",
         "Eric", "Fiona", "George", "Helen", "Ivan", "Julia")  # fmt: skip
THINGS = ("apple", "boat", "candle", "drum", "engine", "flag", "garden", "hammer", "island", "jacket", "key", "lamp",
          "mirror", "needle", "orange", "piano", "queen", "river", "stone", "table", "umbrella", "village", "window",
          "yellow", "bottle", "castle", "dragon", "eagle", "forest", "guitar", "hotel", "letter")  # fmt: skip
ITEMS = (2, 4, 8, 16, 32)
BUCKETS = 8  # of positions


def held_out_rows(tokenizer, file: Path, length: int, most: int) -> Tensor:
    """(rows, length) token ids of a domain's held-out documents, each cut into rows; rests are left out.

    Of more than `most` rows, as many that lie evenly among all are taken.
    """
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        rows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    chosen = range(len(rows)) if len(rows) <= most else torch.linspace(0, len(rows) - 1, most).long().tolist()
    return torch.tensor([rows[index] for index in chosen])


@torch.inference_mode()
def text_scores(student, teacher, rows: Tensor) -> dict:
    """KL(teacher || student) in nats per token, share of equal most likely tokens, and both perplexities.

    Args:
        student, teacher: Models of one vocabulary.
        rows: (rows, length).

    Returns:
        "kl", "agreement", "perplexity", "teacher perplexity" over all positions, and "by position": the same for each
        of `BUCKETS` equal parts of the length.
    """
    totals = torch.zeros(4, rows.shape[1] - 1, dtype=torch.float64)
    for row in rows.to(student.device).split(1):
        ours, theirs = (model(input_ids=row).logits[0, :-1].float().log_softmax(-1) for model in (student, teacher))
        targets = row[0, 1:, None]
        totals[0] += (theirs.exp() * (theirs - ours)).sum(-1).cpu()
        totals[1] += (ours.argmax(-1) == theirs.argmax(-1)).cpu()
        totals[2] -= ours.gather(-1, targets)[:, 0].cpu()
        totals[3] -= theirs.gather(-1, targets)[:, 0].cpu()
    means = totals / len(rows)

    def named(part: Tensor) -> dict:
        kl, agreement, loss, teacher_loss = part.mean(-1).tolist()
        perplexities = {"perplexity": math.exp(loss), "teacher perplexity": math.exp(teacher_loss)}
        return {"kl": kl, "agreement": agreement} | perplexities

    parts = means.tensor_split(BUCKETS, dim=-1)
    return named(means) | {"by position": [named(part) for part in parts]}


def recall_prompts(items: int, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Lists of `items` people and their things, a line each, and the thing that comes next: (text, thing)."""
    generator = torch.Generator().manual_seed(seed + items)
    for _ in range(count):
        people = [NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:items]]
        things = [THINGS[i] for i in torch.randperm(len(THINGS), generator=generator)[:items]]
        asked = int(torch.randint(items, (1,), generator=generator))
        lines = [f"{person}: {thing}" for person, thing in zip(people, things, strict=True)]
        yield "\n".join([*lines, f"{people[asked]}:"]), f" {things[asked]}"


@torch.inference_mode()
def recall_scores(model, tokenizer, count: int = 24) -> dict[int, float]:
    """Share of lists whose thing is the likeliest of all `THINGS`, by the number of items."""
    candidates = torch.tensor([tokenizer(f" {thing}", add_special_tokens=False)["input_ids"][0] for thing in THINGS])
    scores = {}
    for items in ITEMS:
        right = 0
        for text, thing in recall_prompts(items, count):
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].cpu()[candidates]
            right += THINGS[int(logits.argmax())] == thing.strip()
        scores[items] = right / count
    return scores


@torch.inference_mode()
def answers_kl(student, teacher, tokenizer, file: Path, most: int) -> dict:
    """KL and agreement on the tokens of held-out answers that the teacher wrote, the one that ends a turn included."""
    ends, kl, agreement, tokens = {tokenizer.eos_token_id}, 0.0, 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines()[:most]:
        messages = json.loads(line)["messages"]
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        while ids[-1] not in ends:  # what templates write behind a turn
            ids.pop()
        row = torch.tensor([ids], device=student.device)
        kept = torch.arange(len(before) - 1, row.shape[1] - 1)
        ours, theirs = (model(input_ids=row, logits_to_keep=kept).logits[0].float() for model in (student, teacher))
        kl += float(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True))
        agreement += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(kept)
    return {"kl": kl / tokens, "agreement": agreement / tokens}


def conversations(model, tokenizer) -> dict[str, str]:
    """Greedy answers of at most 64 tokens to `PROMPTS`."""
    return {
        prompt: model.chat(tokenizer, None, prompt, {"max_new_tokens": 64, "do_sample": False}) for prompt in PROMPTS
    }


def all_scores(folder: Path, teacher_folder: Path, data: Path, length: int, rows: int) -> dict:
    """Everything above of a model folder, on text of `length` tokens and of four times as many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(teacher_folder)
    student, teacher = (
        MmMambaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(device).eval()
        for path in (folder, teacher_folder)
    )
    scores = {"text": {}, "long text": {}}
    for domain in ("speeches", "novel", "help"):
        file = data / f"test-{domain}.jsonl"
        scores["text"][domain] = text_scores(student, teacher, held_out_rows(tokenizer, file, length, rows))
    long_rows = held_out_rows(tokenizer, data / "test-speeches.jsonl", 4 * length, max(1, rows // 2))
    scores["long text"]["speeches"] = text_scores(student, teacher, long_rows)
    scores["answers"] = answers_kl(student, teacher, tokenizer, data / "test-answers.jsonl", 2 * rows)
    scores["recall"] = recall_scores(student, tokenizer)
    scores["conversations"] = conversations(student, tokenizer)
    return scores
