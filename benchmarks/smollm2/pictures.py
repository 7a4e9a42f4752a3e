"""Pictures of the experiment, from npm: emoji as eight designs draw them, and conversations about them.

A concept is an emoji of the kinds in `KINDS` whose name is one word and which all designs draw ("cow" and "cow face"
are one). One vendor's design is held out as a whole. Pictures are 64 x 64 pixels on white.
"""

import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from mmmamba.benchmarks.smollm2.packages import fetch
from mmmamba.conversion.shards import write_text


SIDE = 64
# By design: the package, and where its pictures are; of Google and Facebook there is an older design, too.
DESIGNS = {
    "apple": ("emoji-datasource-apple@16.0.0", "package/img/apple/64/"),
    "google": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "google-blobs": ("emoji-datasource-google@3.0.0", "package/img/google/64/"),
    "facebook": ("emoji-datasource-facebook@16.0.0", "package/img/facebook/64/"),
    "facebook-old": ("emoji-datasource-facebook@4.0.3", "package/img/facebook/64/"),
    "emojione": ("emoji-datasource-emojione@3.0.0", "package/img/emojione/64/"),
    "joypixels": ("emoji-assets@11.0.0", "package/png/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
}
HELD_OUT = "twitter"
KINDS = {  # by Unicode's subcategory
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "animal-reptile": "reptile",
    "plant-flower": "flower",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-sweet": "dessert",
    "food-prepared": "dish",
    "transport-ground": "vehicle",
    "transport-air": "vehicle",
    "transport-water": "vehicle",
}
# Kinds themselves, and names that are not of their kind or not what the picture shows.
EXCLUDED = {"bird", "bug", "anchor", "cooking", "motorway", "rosette", "satellite", "seat", "station"}
WITHOUT_ARTICLE = {"bacon", "bread", "cherries", "grapes", "pancakes", "peanuts", "popcorn"}
VARIATIONS = 3  # of a training picture: as it is, and changed a little
SEEN = 60  # training pictures that are asked about, too
AUGMENTATION = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(20, translate=(0.1, 0.1), scale=(0.7, 1.1), shear=8, fill=255),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.05),
    ]
)


@dataclass(frozen=True)
class Concept:
    """What some pictures show: its name, its kind, and the emoji (file names without ending) that show it."""

    name: str
    kind: str
    emoji: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about one picture: `about` is "name", "kind" or "yes/no"; the picture's path is relative."""

    image: str
    about: str
    question: str
    answer: str


def with_article(name: str) -> str:
    """The name as it is said: "a cow", "an owl", "grapes"."""
    return name if name in WITHOUT_ARTICLE else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def prepare_pictures(folder: Path) -> None:
    """Makes `pictures/`, `concepts.json` and the files of `write_conversations` in a folder; what is there stays.

    Raises:
        ValueError: if a package is another one than that of the published figures.
        OSError: if the registry cannot be reached.
    """
    if (folder / "test.jsonl").is_file():
        return
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archives = {design: fetch(package, downloads) for design, (package, _) in DESIGNS.items()}
    with tarfile.open(archives[HELD_OUT]) as archive:
        entries = json.loads(archive.extractfile("package/emoji.json").read())
    wanted = {Path(entry["image"]).stem for entry in entries if entry["subcategory"] in KINDS}
    drawn = {
        design: {
            emoji: _save(image, folder / "pictures" / design / f"{emoji}.png")
            for emoji, image in _images(file, DESIGNS[design][1], wanted)
        }
        for design, file in archives.items()
    }
    concepts = find_concepts(entries, drawn)
    write_text(folder / "concepts.json", json.dumps([asdict(concept) for concept in concepts], indent=1) + "\n")
    write_conversations(folder, concepts)


def read_concepts(folder: Path) -> list[Concept]:
    """What `prepare_pictures` wrote."""
    values = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    return [Concept(value["name"], value["kind"], tuple(value["emoji"])) for value in values]


def _images(file: Path, prefix: str, wanted: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """An archive's pictures of these emoji, whose file names may have a variation selector more or less."""
    names = {emoji.replace("-fe0f", ""): emoji for emoji in wanted}
    with tarfile.open(file) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix):
                emoji = names.get(Path(member.name).stem.replace("-fe0f", ""))
                if emoji is not None:
                    yield emoji, Image.open(io.BytesIO(archive.extractfile(member).read()))


def _save(image: Image.Image, file: Path) -> Path:
    """Writes a picture as 64 x 64 pixels on white."""
    image = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    file.parent.mkdir(parents=True, exist_ok=True)
    white.convert("RGB").save(file)
    return file


def find_concepts(entries: list[dict], drawn: dict[str, dict]) -> list[Concept]:
    """The concepts, by name.

    Args:
        entries: Of `emoji.json`: `name`, `subcategory`, `image`.
        drawn: By design, what it draws.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        emoji, kind = Path(entry["image"]).stem, KINDS.get(entry["subcategory"])
        name = (entry["name"] or "").lower().removesuffix(" face")
        if (
            kind
            and name.isalpha()
            and name not in EXCLUDED
            and all(emoji in of_design for of_design in drawn.values())
        ):
            found[name, kind].append(emoji)
    return [Concept(name, kind, tuple(sorted(emoji))) for (name, kind), emoji in sorted(found.items())]


def training_pictures(concepts: list[Concept]) -> Iterator[tuple[str, Concept]]:
    """Paths below `pictures/`, and what they show, of all designs but the one that is held out."""
    for design in DESIGNS:
        if design != HELD_OUT:
            for concept in concepts:
                for emoji in concept.emoji:
                    yield f"{design}/{emoji}.png", concept


def questions(image: str, concept: Concept, concepts: list[Concept], draw: random.Random) -> list[Question]:
    """Four questions about a picture: its name, its kind, and two for yes and no.

    Half of the names that it is not are of its kind.
    """
    relatives = [other for other in concepts if other.kind == concept.kind and other != concept]
    others = relatives if relatives and draw.random() < 0.5 else [other for other in concepts if other != concept]
    return [
        Question(image, "name", "What is this?", f"{with_article(concept.name).capitalize()}."),
        Question(image, "kind", "What kind of thing is this?", f"{with_article(concept.kind).capitalize()}."),
        Question(image, "yes/no", f"Is this {with_article(concept.name)}?", "Yes."),
        Question(image, "yes/no", f"Is this {with_article(draw.choice(others).name)}?", "No."),
    ]


def write_conversations(folder: Path, concepts: list[Concept]) -> None:
    """Writes conversations to train on and questions to be asked.

    - `train.jsonl`: conversations of four questions in any order, `VARIATIONS` of each training picture;
    - `test.jsonl`: questions about the held-out pictures, three each: name, kind, and one of yes and no;
    - `seen.jsonl`: the same about `SEEN` training pictures;
    - `test-conversations.jsonl`: conversations about the held-out pictures.
    """
    draw = random.Random(0)
    torch.manual_seed(0)  # of the augmentation
    rows = []
    for path, concept in training_pictures(concepts):
        picture = Image.open(folder / "pictures" / path)
        for variation in range(VARIATIONS):
            name = path
            if variation:
                name = f"varied/{path.replace('/', '-').removesuffix('.png')}-{variation}.png"
                _save(AUGMENTATION(picture), folder / "pictures" / name)
            rows.append(_conversation(questions(name, concept, concepts, draw), draw))
    draw.shuffle(rows)
    _write_lines(folder / "train.jsonl", rows)
    held_out = [(f"{HELD_OUT}/{emoji}.png", concept) for concept in concepts for emoji in concept.emoji]
    asked = [questions(path, concept, concepts, draw) for path, concept in held_out]
    _write_lines(folder / "test-conversations.jsonl", [_conversation(of_picture, draw) for of_picture in asked])
    seen = draw.sample(list(training_pictures(concepts)), min(SEEN, len(held_out)))
    asked_seen = [questions(path, concept, concepts, draw) for path, concept in seen]
    for split, pictures in {"seen": asked_seen, "test": asked}.items():  # the test last: it marks all as complete
        chosen = [question for i, four in enumerate(pictures) for question in (*four[:2], four[2 + i % 2])]
        _write_lines(folder / f"{split}.jsonl", [asdict(question) for question in chosen])


def read_questions(file: Path) -> list[Question]:
    """Questions that `write_conversations` wrote."""
    return [Question(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _conversation(asked: list[Question], draw: random.Random) -> dict:
    """A record for `mmmamba distill`."""
    turns = []
    for question in draw.sample(asked, len(asked)):
        turns += [{"from": "human", "value": question.question}, {"from": "gpt", "value": question.answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": asked[0].image, "conversations": turns}


def _write_lines(file: Path, rows: list[dict]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
