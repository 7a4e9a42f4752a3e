"""The picture world: coloured shapes and numbered cards on a light background, and questions about them.

Everything is generated from integers: `example(split, seed, index)` always gives the same pictures, question and
answer, and any index is allowed. A picture is `cols x rows` tiles of 48 pixels, so that the model's dynamic tiling
cuts it into exactly its tiles, and shows one to six things, each in a cell of 24 x 24 pixels. Whether a picture
belongs to training or is held out depends on what it shows, so no held-out picture can occur in training, whatever
the seeds.

    pictures, question, answer = example("test", seed=0, index=7)[1:]
    pictures[0].draw().resize((480, 480)).show()

`python -m mmmamba.examples.shapes.world FOLDER` writes a sheet of examples to look at.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont


TILE = 48
CELL = 24
MAX_TILES = 6

COLORS = {
    "red": (222, 45, 48),
    "orange": (250, 140, 22),
    "yellow": (240, 205, 35),
    "green": (40, 160, 75),
    "blue": (45, 105, 220),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "card")
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third")
GRIDS = ((1, 1), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2))  # one per number of tiles
GRID_WEIGHTS = (0.3, 0.25, 0.12, 0.18, 0.05, 0.1)

_SPLITS = {"train": 0, "test": 1}
_HELD_OUT_SHARE = 8  # one picture in eight is held out
_OVERSAMPLING = 8


class Thing(NamedTuple):
    """One shape or card: what it is, its cell (column, row), and how it is drawn there (pixels)."""

    color: str
    shape: str
    number: int | None
    cell: tuple[int, int]
    size: int
    offset: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


class Picture(NamedTuple):
    """A scene: its grid of tiles (columns, rows), the colour of its background, and its things in tile order."""

    grid: tuple[int, int]
    background: tuple[int, int, int]
    things: tuple[Thing, ...]

    def draw(self) -> Image.Image:
        """The picture as RGB, `48 * columns` by `48 * rows` pixels."""
        image = Image.new("RGB", (self.grid[0] * TILE, self.grid[1] * TILE), self.background)
        for thing in self.things:
            sprite = _sprite(thing.color, thing.shape, thing.number, thing.size)
            corner = tuple(
                at * CELL + (CELL - thing.size) // 2 + shift
                for at, shift in zip(thing.cell, thing.offset, strict=True)
            )
            image.paste(sprite, corner, sprite)
        return image

    @property
    def held_out(self) -> bool:
        content = [(t.color, t.shape, t.number, t.cell) for t in self.things]
        return crc32(repr((self.grid, content)).encode()) % _HELD_OUT_SHARE == 0


class Example(NamedTuple):
    """One question about one or several pictures."""

    kind: str
    pictures: tuple[Picture, ...]
    question: str
    answer: str


# --- drawing -------------------------------------------------------------------------------------------------------


@cache
def _sprite(color: str, shape: str, number: int | None, size: int) -> Image.Image:
    """A thing as RGBA, `size` pixels square, drawn large and shrunk so that its edges are smooth."""
    side = size * _OVERSAMPLING
    edge = side - 1
    fill = COLORS[color]
    outline = tuple(channel * 3 // 4 for channel in fill)
    line = side // 14
    sprite = Image.new("RGBA", (side, side), (*fill, 0))
    draw = ImageDraw.Draw(sprite)
    if shape == "circle":
        draw.ellipse((0, 0, edge, edge), fill, outline, line)
    elif shape == "square":
        draw.rounded_rectangle(
            (side // 16, side // 16, edge - side // 16, edge - side // 16), side // 12, fill, outline, line
        )
    elif shape == "card":
        paper = tuple((255 + channel) // 2 for channel in fill)  # light enough to read on, tinted enough to recognise
        draw.rounded_rectangle((0, 0, edge, edge), side // 8, paper, fill, side // 9)
        font = ImageFont.load_default(size=side * 0.62)
        draw.text((side / 2, side / 2), str(number), (25, 25, 35), font, "mm", stroke_width=side / 60)
    else:
        points = [(x * edge, y * edge) for x, y in _OUTLINES[shape]]
        draw.polygon(points, fill)
        draw.line([*points, points[0], points[1]], outline, line, joint="curve")
    return sprite.resize((size, size), Image.Resampling.LANCZOS)


def _star() -> list[tuple[float, float]]:
    return [
        (0.5 + radius * math.sin(angle), 0.53 - radius * math.cos(angle))
        for angle, radius in ((math.pi * i / 5, 0.5 if i % 2 == 0 else 0.22) for i in range(10))
    ]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (
            0.5 + 0.46 * math.sin(t) ** 3,
            0.44 - 0.030 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in angles
    ]


_OUTLINES = {"triangle": [(0.5, 0.06), (0.96, 0.94), (0.04, 0.94)], "star": _star(), "heart": _heart()}


# --- scenes --------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return rng.random() < probability


def scene(rng: np.random.Generator, split: str, small: bool = False) -> Picture:
    """Draws a picture of `split` ("train" or "test"); a `small` one has fewer tiles and at most three things."""
    while True:
        picture = _any_scene(rng, small)
        if picture.held_out == (split == "test"):
            return picture


def _any_scene(rng: np.random.Generator, small: bool) -> Picture:
    weights = (0.5, 0.25, 0.1, 0.15, 0, 0) if small else GRID_WEIGHTS
    grid = GRIDS[int(rng.choice(len(GRIDS), p=weights))]
    columns, rows = 2 * grid[0], 2 * grid[1]
    max_things = 3 if small else min(6, columns * rows)
    count = int(rng.integers(1, max_things + 1))
    # Counting and comparing need things that are alike: choose from fewer colours and shapes half of the time.
    colors, shapes = list(COLORS), list(SHAPES)
    if _chance(rng, 0.5):
        colors = [str(c) for c in rng.choice(colors, 3, replace=False)]
    if _chance(rng, 0.5):
        shapes = [str(s) for s in rng.choice(shapes, 3, replace=False)]
    corners = [(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)]
    cells = [(x, y) for x in range(columns) for y in range(rows)]
    cells = [cells[i] for i in rng.permutation(len(cells))[:count]]
    if _chance(rng, 0.5):  # otherwise corners would be empty in most of the large pictures
        corner = _pick(rng, corners)
        if corner not in cells:
            cells[0] = corner
    things = []
    for cell in sorted(cells, key=_tile_order(grid)):
        shape = "card" if _chance(rng, 0.25) else _pick(rng, shapes)
        is_card = shape == "card"
        things.append(
            Thing(
                color=_pick(rng, colors),
                shape=shape,
                number=_number(rng) if is_card else None,
                cell=cell,
                # Cards are neither shrunk nor shifted: their digits are seven pixels high, hard enough to read.
                size=20 if is_card else int(rng.integers(18, 21)),
                offset=(0, 0) if is_card else (int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            )
        )
    background = tuple(int(v) for v in rng.integers(238, 256, 3))
    return Picture(grid, background, tuple(things))


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(10)) if _chance(rng, 0.5) else int(rng.integers(10, 100))


def _tile_order(grid: tuple[int, int]) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Orders cells as the model sees them: tile by tile, and by rows inside a tile."""
    return lambda cell: (cell[1] // 2, cell[0] // 2, cell[1] % 2, cell[0] % 2)


# --- questions: each function returns (question, answer), or None if it cannot be asked about these pictures ---------


def _tally(things) -> Counter:
    """How often each colour and each shape occurs."""
    counts = Counter(t.color for t in things)
    counts.update(t.shape for t in things)
    return counts


def _plural(attribute: str) -> str:
    return f"{attribute} objects" if attribute in COLORS else f"{attribute}s"


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _ask_color(rng, pictures):
    counts = _tally(pictures[0].things)
    things = [t for t in pictures[0].things if counts[t.shape] == 1]
    if not things:
        return None
    thing = _pick(rng, things)
    return f"What color is the {thing.shape}?", thing.color


def _ask_shape(rng, pictures):
    counts = _tally(pictures[0].things)
    things = [t for t in pictures[0].things if counts[t.color] == 1]
    if not things:
        return None
    thing = _pick(rng, things)
    return f"What shape is the {thing.color} object?", thing.shape


def _ask_count(rng, pictures):
    return "How many objects are there?", COUNT_WORDS[len(pictures[0].things)]


def _ask_tally(rng, pictures):
    counts = _tally(pictures[0].things)
    by_count: dict[int, list[str]] = {}
    for attribute in (*COLORS, *SHAPES):
        by_count.setdefault(min(counts[attribute], 3), []).append(attribute)
    # In scenes large counts are rare and zero always occurs, so weights balance the answers.
    weights = np.array([{0: 1.0, 1: 1.3, 2: 3.0, 3: 6.0}[n] for n in by_count])
    attribute = _pick(rng, list(by_count.values())[int(rng.choice(len(weights), p=weights / weights.sum()))])
    return f"How many {_plural(attribute)} are there?", COUNT_WORDS[counts[attribute]]


def _absent_name(rng, pictures) -> str | None:
    """A name that no picture shows; mostly its colour and its shape occur, in different things."""
    things = [t for p in pictures for t in p.things]
    present = {t.name for t in things}
    recombined = sorted({f"{a.color} {b.shape}" for a in things for b in things} - present)
    if recombined and _chance(rng, 0.6):
        return _pick(rng, recombined)
    absent = [n for n in (f"{c} {s}" for c in COLORS for s in SHAPES) if n not in present]
    thing = _pick(rng, things)
    half_present = [n for n in absent if thing.color in n.split() or thing.shape in n.split()]
    return _pick(rng, half_present or absent)


def _ask_exist(rng, pictures):
    if _chance(rng, 0.5):
        return f"Is there {_article(_pick(rng, pictures[0].things).name)}?", "yes"
    return f"Is there {_article(_absent_name(rng, pictures))}?", "no"


def _ask_number(rng, pictures):
    cards = [t for t in pictures[0].things if t.shape == "card"]
    if len(cards) == 1 and _chance(rng, 0.5):
        return "What number is on the card?", str(cards[0].number)
    colors = Counter(t.color for t in cards)
    cards = [t for t in cards if colors[t.color] == 1]
    if not cards:
        return None
    card = _pick(rng, cards)
    return f"What number is on the {card.color} card?", str(card.number)


def _ask_corner(rng, pictures):
    picture = pictures[0]
    columns, rows = 2 * picture.grid[0], 2 * picture.grid[1]
    name_at = {t.cell: t.name for t in picture.things}
    corners = {
        "top left": (0, 0),
        "top right": (columns - 1, 0),
        "bottom left": (0, rows - 1),
        "bottom right": (columns - 1, rows - 1),
    }
    filled = [name for name, cell in corners.items() if cell in name_at]
    empty = [name for name, cell in corners.items() if cell not in name_at]
    if filled and (not empty or _chance(rng, 0.85)):
        name = _pick(rng, filled)
    elif filled:
        name = _pick(rng, empty)
    else:
        return None
    return f"What is in the {name} corner?", name_at.get(corners[name], "nothing")


def _ask_where(rng, pictures):
    picture = pictures[0]
    names = Counter(t.name for t in picture.things)
    things = [t for t in picture.things if names[t.name] == 1]
    if not things or picture.grid not in (
        (1, 1),
        (2, 1),
        (2, 2),
    ):  # in wider ones a quarter ends inside a tile
        return None
    thing = _pick(rng, things)
    return f"Where is the {thing.name}?", quadrant(picture, thing)


def quadrant(picture: Picture, thing: Thing) -> str:
    """The quarter of the picture that a thing lies in: "top left", "top right", "bottom left" or "bottom right"."""
    vertical = "top" if thing.cell[1] < picture.grid[1] else "bottom"
    return f"{vertical} {'left' if thing.cell[0] < picture.grid[0] else 'right'}"


def _ask_compare(rng, pictures):
    counts = _tally(pictures[0].things)
    attributes = list(COLORS) if _chance(rng, 0.5) else list(SHAPES)
    present = [a for a in attributes if counts[a]]
    yes = _chance(rng, 0.5)
    # Mostly both sides of the comparison occur, so that seeing one of them does not give the answer away.
    others = present if len(present) > 1 and _chance(rng, 0.75) else attributes
    pairs = [(a, b) for a in present for b in others if a != b]
    unequal = [(a, b) if (counts[a] > counts[b]) == yes else (b, a) for a, b in pairs if counts[a] != counts[b]]
    equal = [(a, b) for a, b in pairs if counts[a] == counts[b]]
    if not yes and equal and (not unequal or _chance(rng, 0.3)):
        unequal = equal
    if not unequal:
        return None
    more, less = _pick(rng, unequal)
    return f"Are there more {_plural(more)} than {_plural(less)}?", "yes" if yes else "no"


def _ask_which(rng, pictures):
    names = Counter(name for p in pictures for name in {t.name for t in p.things})
    found = [i for i, p in enumerate(pictures) if any(names[t.name] == 1 for t in p.things)]
    if not found:
        return None
    index = _pick(rng, found)
    name = _pick(rng, sorted({t.name for t in pictures[index].things if names[t.name] == 1}))
    return f"Which picture has {_article(name)}?", ORDINALS[index]


def _ask_pick(rng, pictures):
    index = int(rng.integers(len(pictures)))
    things = pictures[index].things
    counts = _tally(things)
    wording = int(rng.integers(3))
    if wording == 0:
        return f"How many objects are in the {ORDINALS[index]} picture?", COUNT_WORDS[len(things)]
    unique = [t for t in things if counts[t.shape] == 1 and (t.shape == "card") == (wording == 1)]
    if not unique:
        return None
    thing = _pick(rng, unique)
    if wording == 1:
        return f"What number is on the card in the {ORDINALS[index]} picture?", str(thing.number)
    return f"What color is the {thing.shape} in the {ORDINALS[index]} picture?", thing.color


ONE_PICTURE = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "tally": _ask_tally,
    "exist": _ask_exist,
    "number": _ask_number,
    "corner": _ask_corner,
    "where": _ask_where,
    "compare": _ask_compare,
}
SEVERAL_PICTURES = {"which": _ask_which, "pick": _ask_pick}
KINDS = (*ONE_PICTURE, *SEVERAL_PICTURES)
# Arguments of `conversation` for training: kinds that are hard to learn are asked more often than by default.
TRAINING = {"turns": 10, "several_pictures": 0.3, "repeats": {"corner": 2, "where": 3, "which": 6, "pick": 3}}


# --- examples and conversations --------------------------------------------------------------------------------------


def _generator(split: str, seed: int, index: int) -> np.random.Generator:
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'test'.")
    return np.random.default_rng((_SPLITS[split], seed, index))


def _pictures(rng: np.random.Generator, split: str, several: bool) -> tuple[Picture, ...]:
    if not several:
        return (scene(rng, split),)
    return tuple(scene(rng, split, small=True) for _ in range(2 if _chance(rng, 0.6) else 3))


def example(split: str, seed: int, index: int) -> Example:
    """The question number `index` of a stream: pictures, question and answer; all kinds are equally frequent.

    Args:
        split: "train" or "test"; no picture occurs in both.
        seed: Which stream, a number of at least 0.
        index: Which of its questions, a number of at least 0.
    """
    rng = _generator(split, seed, index)
    kind = KINDS[index % len(KINDS)]
    ask = ONE_PICTURE.get(kind) or SEVERAL_PICTURES[kind]
    while True:
        pictures = _pictures(rng, split, kind in SEVERAL_PICTURES)
        if asked := ask(rng, pictures):
            return Example(kind, pictures, *asked)


def conversation(
    split: str,
    seed: int,
    index: int,
    turns: int = 8,
    several_pictures: float = 0.22,
    repeats: Mapping[str, int] = MappingProxyType({"which": 3, "pick": 3}),
) -> tuple[tuple[Picture, ...], list[tuple[str, str]]]:
    """Conversation number `index` of a stream: pictures and up to `turns` (question, answer) pairs about them.

    Several questions share the work of seeing the pictures, which makes training cheaper.

    Args:
        split, seed, index: As in `example`.
        turns: Largest number of questions.
        several_pictures: Share of conversations about several pictures.
        repeats: Kind to how often it may be asked; once if it is not named.
    """
    rng = _generator(split, seed, index)
    several = _chance(rng, several_pictures)
    while True:
        pictures = _pictures(rng, split, several)
        if asked := questions(rng, pictures, turns, repeats):  # there may be none that tells the pictures apart
            return pictures, asked


def questions(
    rng: np.random.Generator, pictures: tuple[Picture, ...], turns: int, repeats: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Up to `turns` different questions about one or several pictures, with their answers; see `conversation`."""
    kinds = SEVERAL_PICTURES if len(pictures) > 1 else ONE_PICTURE
    order = [kind for kind in kinds for _ in range(repeats.get(kind, 1))]
    asked: dict[str, str] = {}
    for i in rng.permutation(len(order)):
        if len(asked) < turns and (pair := kinds[order[i]](rng, pictures)):
            asked[pair[0]] = pair[1]
    return list(asked.items())


def sheet(seed: int = 0, count: int = 24, zoom: int = 4) -> Image.Image:
    """A page of examples: each picture enlarged, with its question and answer below."""
    font = ImageFont.load_default(size=18)
    columns, width, height = 3, 540, 480
    page = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for index in range(count):
        shown = example("test", seed, index)
        left, top = index % columns * width + 10, index // columns * height + 10
        x = left
        for picture in shown.pictures:
            image = picture.draw()
            scale = min(zoom, 520 / len(shown.pictures) / image.width - 0.05)
            image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
            page.paste(image, (x, top))
            x += image.width + 8
        draw.text((left, top + 400), f"{shown.question}\n{shown.answer}", "black", font)
    return page


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    sheet().save(folder / "sheet.png")
