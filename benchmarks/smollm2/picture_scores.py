"""What a student that reads pictures is worth beside its teacher: exact match of its answers, and KL."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mmmamba.benchmarks.smollm2.pictures import (
    HELD_OUT,
    SIDE,
    Question,
    read_concepts,
    read_questions,
    training_pictures,
)
from mmmamba.conversion.distillation.data import open_data, pad
from mmmamba.conversion.distillation.data.training_data import load_processor
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


ABOUT = ("name", "kind", "yes/no")
SPLITS = {"test": "test.jsonl", "seen": "seen.jsonl"}
BATCH_SIZE, ANSWER_TOKENS = 16, 8
BLANK_QUESTIONS = 120  # of the test's, which are also asked about a blank picture
CONVERSATIONS = 40  # whose KL is taken
COARSE = 12  # side of the pictures whose pixels are compared


@torch.inference_mode()
def answers(model, tokenizer, questions: list[Question], pictures: Path, blank: bool = False) -> list[str]:
    """Greedy answers.

    Args:
        pictures: Folder that the questions' pictures are in.
        blank: Show white pictures instead. What is asked twice is answered once then.
    """
    white = Image.new("RGB", (SIDE, SIDE), "white")
    asked = [(None if blank else question.image, question.question) for question in questions]
    found, pending = {}, list(dict.fromkeys(asked))
    for start in range(0, len(pending), BATCH_SIZE):
        batch = pending[start : start + BATCH_SIZE]
        images = [white if image is None else Image.open(pictures / image) for image, _ in batch]
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        said = model.batch_chat(tokenizer, images, [f"<image>\n{text}" for _, text in batch], options)
        found |= zip(batch, said, strict=True)
    return [found[one] for one in asked]


def exact_match(questions: list[Question], said: list[str]) -> dict[str, float]:
    """Share of right answers by what the questions are about."""
    right = {about: [] for about in ABOUT}
    for question, answer in zip(questions, said, strict=True):
        right[question.about].append(answer.strip() == question.answer)
    return {about: sum(values) / len(values) for about, values in right.items()}


def most_frequent(questions: list[Question]) -> dict[str, float]:
    """Exact match of saying the most frequent answer each time."""
    counts = {about: Counter(one.answer for one in questions if one.about == about) for about in ABOUT}
    return {about: max(count.values()) / count.total() for about, count in counts.items()}


def nearest_picture(folder: Path, questions: list[Question]) -> dict[str, float]:
    """Exact match of the name and kind of the training picture whose coarse pixels are nearest, mirrored or not."""
    concepts = read_concepts(folder)

    def pixels(path: str) -> np.ndarray:
        with Image.open(folder / "pictures" / path) as picture:
            coarse = picture.resize((COARSE, COARSE), Image.Resampling.BOX)
        return np.asarray(coarse, dtype=np.float32)

    known = [(pixels(path), concept) for path, concept in training_pictures(concepts)]
    rows = np.stack([side for picture, _ in known for side in (picture, picture[:, ::-1])])
    shown = {f"{HELD_OUT}/{emoji}.png": concept for concept in concepts for emoji in concept.emoji}
    right = {"name": [], "kind": []}
    for path in dict.fromkeys(question.image for question in questions):
        nearest = known[int(((rows - pixels(path)) ** 2).sum((1, 2, 3)).argmin()) // 2][1]
        for about, values in right.items():
            values.append(getattr(nearest, about) == getattr(shown[path], about))
    return {about: sum(values) / len(values) for about, values in right.items()}


@torch.inference_mode()
def answers_kl(student, teacher, processor, file: Path, pictures: Path, most: int) -> dict[str, float]:
    """KL(teacher || student) in nats per token, and agreement, on the answers of conversations about pictures."""
    data = open_data({"file": str(file), "root": str(pictures)}, processor)
    kl = agreement = tokens = 0.0
    for index in range(min(most, len(data))):
        batch = {key: value.to(student.device) for key, value in pad([data[index]], pad_token_id=0).items()}
        kept = (batch.pop("labels")[0, 1:] != -100).nonzero()[:, 0]
        ours, theirs = (model(**batch, logits_to_keep=kept).logits[0].float() for model in (student, teacher))
        kl += float(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True))
        agreement += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(kept)
    return {"kl": kl / tokens, "agreement": agreement / tokens}


def all_scores(folder: Path, teacher_folder: Path, data: Path) -> dict:
    """Everything above of a model folder, and its answers.

    Args:
        data: Folder that `prepare_pictures` filled.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, processor = load_tokenizer(teacher_folder), load_processor(teacher_folder)
    student, teacher = (
        MmMambaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(device).eval()
        for path in (folder, teacher_folder)
    )
    scores: dict = {"exact": {}, "answers": {}}
    for split, name in SPLITS.items():
        questions = read_questions(data / name)
        said = answers(student, tokenizer, questions, data / "pictures")
        scores["exact"][split], scores["answers"][split] = exact_match(questions, said), said
    questions = read_questions(data / SPLITS["test"])
    some = questions[:BLANK_QUESTIONS]
    scores["exact"]["blank"] = exact_match(some, answers(student, tokenizer, some, data / "pictures", blank=True))
    scores["exact"]["most frequent"] = most_frequent(questions)
    scores["exact"]["nearest picture"] = nearest_picture(data, questions)
    conversations = data / "test-conversations.jsonl"
    scores["conversations"] = answers_kl(student, teacher, processor, conversations, data / "pictures", CONVERSATIONS)
    return scores
