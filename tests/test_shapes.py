"""The picture world: deterministic, varied, answerable from the pixels and only from them; and its training data."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from mmmamba.examples.shapes import evaluate, tokenizer, world
from mmmamba.examples.shapes.data import Conversations
from mmmamba.examples.shapes.folder import make_processor
from mmmamba.examples.shapes.recall import WORDS, RecallConversations, recall, single_token_names
from mmmamba.examples.shapes.world import (
    CELL,
    COLORS,
    KINDS,
    SHAPES,
    TILE,
    Picture,
    Thing,
    conversation,
    example,
    quadrant,
)
from mmmamba.processing_mmmamba import encode_conversation


@pytest.fixture(scope="module")
def examples():
    return [example("test", 0, index) for index in range(1200)]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def of_kind(examples, kind):
    return [one for one in examples if one.kind == kind]


def test_the_same_numbers_give_the_same_example():
    assert example("train", 3, 14) == example("train", 3, 14)
    assert example("train", 3, 14) != example("train", 4, 14)
    assert conversation("train", 0, 5) == conversation("train", 0, 5)
    first, second = (example("test", 0, 7).pictures[0].draw() for _ in range(2))
    assert first.tobytes() == second.tobytes()
    with pytest.raises(ValueError, match="split='validation'"):
        example("validation", 0, 0)


def test_every_kind_has_its_share(examples):
    shares = Counter(one.kind for one in examples)
    assert set(shares) == set(KINDS)
    assert len(KINDS) >= 8
    assert min(shares.values()) >= 0.05 * len(examples)


def test_pictures_use_one_to_six_tiles_and_prompts_one_to_three_pictures(examples, processor):
    tiles, counts = set(), set()
    for one in examples[:300]:
        counts.add(len(one.pictures))
        for picture in one.pictures:
            image = picture.draw()
            assert image.size == (picture.grid[0] * TILE, picture.grid[1] * TILE)
            found = int(processor.image_processor(image, return_tensors="pt")["num_patches"][0])
            expected = picture.grid[0] * picture.grid[1]
            assert found == expected + (expected > 1)  # and the thumbnail
            tiles.add(expected)
    assert tiles == {1, 2, 3, 4, 5, 6}
    assert counts == {1, 2, 3}


def test_no_held_out_picture_is_trained_on():
    train = [picture for index in range(400) for picture in conversation("train", 0, index)[0]]
    test = [picture for index in range(400) for picture in example("test", 0, index).pictures]
    assert not any(picture.held_out for picture in train)
    assert all(picture.held_out for picture in test)


def seen(picture: Picture) -> list[str]:
    """The colour of what stands in each cell, read from the pixels alone, tile by tile; "" where it is empty."""
    pixels = np.asarray(picture.draw()).astype(int)
    colors = np.array(list(COLORS.values()))
    found = []
    for top in range(0, pixels.shape[0], TILE):
        for left in range(0, pixels.shape[1], TILE):
            for y in (0, CELL):
                for x in (0, CELL):
                    cell = pixels[top + y : top + y + CELL, left + x : left + x + CELL].reshape(-1, 3)
                    strong = cell[cell.max(1) - cell.min(1) > 90]  # the background and the digits are grey
                    nearest = np.abs(strong[:, None] - colors).sum(2)
                    close = nearest.argmin(1)[nearest.min(1) < 60]
                    found.append(list(COLORS)[np.bincount(close).argmax()] if len(close) > 20 else "")
    return found


def test_answers_are_what_the_pixels_show(examples):
    for one in of_kind(examples, "count")[:40]:
        words = ("zero", "one", "two", "three", "four", "five", "six")
        assert one.answer == words[sum(map(bool, seen(one.pictures[0])))]
    checked = 0
    for one in of_kind(examples, "tally"):
        color = one.question.split()[2]
        if color in COLORS:
            words = ("zero", "one", "two", "three", "four", "five", "six")
            assert one.answer == words[seen(one.pictures[0]).count(color)]
            checked += 1
    assert checked > 20


def thing(color, shape, cell, number=None):
    return Thing(color, shape, number, cell, 20, (0, 0))


def test_where_is_the_quarter_of_the_picture():
    wide = Picture((2, 1), (250, 250, 250), (thing("red", "star", (1, 1)), thing("blue", "card", (2, 0), 7)))
    assert [quadrant(wide, one) for one in wide.things] == ["bottom left", "top right"]


def test_the_question_alone_does_not_give_the_answer(examples):
    """Guessing each question's commonest answer must be far from the scores that models reach."""
    by_question = {}
    for one in examples:
        by_question.setdefault((one.kind, one.question), Counter())[one.answer] += 1
    guessed = sum(counter.most_common(1)[0][1] for counter in by_question.values() if sum(counter.values()) >= 8)
    asked = sum(sum(counter.values()) for counter in by_question.values() if sum(counter.values()) >= 8)
    assert asked > 300
    assert guessed / asked < 0.6


def test_every_kind_has_its_share_of_training(monkeypatch):
    """Counted by the function that asks, in the conversations as they are trained on."""
    asked = Counter()
    for kinds in (world.ONE_PICTURE, world.SEVERAL_PICTURES):
        for kind, ask in kinds.items():

            def counting(*args, kind=kind, ask=ask):
                pair = ask(*args)
                if pair:
                    by_question[pair[0]] = kind
                return pair

            monkeypatch.setitem(kinds, kind, counting)
    for index in range(500):
        by_question = {}
        _, turns = conversation("train", 0, index, **world.TRAINING)
        asked.update(by_question[question] for question, _ in turns)
    assert set(asked) == set(KINDS)
    assert min(asked.values()) >= 0.05 * sum(asked.values())


def test_the_tokenizer_is_what_its_recipe_makes():
    assert tokenizer.train() == tokenizer.MODEL_FILE.read_bytes()


def test_every_word_is_one_token(processor):
    for word in (*COLORS, *SHAPES, "objects", "picture", "corner", "number"):
        assert processor.tokenizer.tokenize(f"the {word}")[-1] == f"▁{word}"


def test_training_rows_are_what_chat_reads(processor):
    rows = Conversations(processor, "train", 0)
    for index in (0, 3, 8):
        row = rows.row(index)
        pictures, turns = conversation("train", 0, index, **world.TRAINING)
        history, (question, _) = turns[:-1], turns[-1]
        places = "<image>" * len(pictures) + "\n"
        if history:
            history = [(places + history[0][0], history[0][1]), *history[1:]]
        else:
            question = places + question
        counts = processor.image_processor([p.draw() for p in pictures], return_tensors="pt")["num_patches"].tolist()
        ids = encode_conversation(processor.tokenizer, question, history or None, counts, processor.tokens_per_tile)
        assert row["input_ids"].tolist()[: len(ids)] == ids
        assert len(row["pixel_values"]) == sum(counts)


def test_labels_hold_every_answer_of_the_conversation(processor):
    rows = Conversations(processor, "train", 0)
    for index in range(10):
        row, (_, turns) = rows.row(index), conversation("train", 0, index, **world.TRAINING)
        answers = row["labels"][row["labels"] != -100].tolist()
        assert answers == row["input_ids"][row["labels"] != -100].tolist()
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert answers.count(end) == len(turns)
        pieces, current = [], []
        for token in answers:
            if token == end:
                pieces.append(processor.tokenizer.decode(current).strip())
                current = []
            else:
                current.append(token)
        assert pieces == [answer for _, answer in turns]


def test_batches_hold_every_conversation_once_and_conversations_of_like_length(processor):
    rows = Conversations(processor, "train", 0, batch_size=4)
    size = rows.pool * 4
    for first in (0, size):
        drawn = [tuple(rows[first + i]["input_ids"].tolist()) for i in range(size)]
        assert sorted(drawn) == sorted(tuple(rows.row(first + i)["input_ids"].tolist()) for i in range(size))
        spans = [sorted(map(len, drawn[i : i + 4])) for i in range(0, size, 4)]
        assert all(before[-1] <= after[0] for before, after in itertools.pairwise(sorted(spans)))
        assert spans != sorted(spans)
    # A run that goes on in the middle reads what it would have read.
    assert torch.equal(Conversations(processor, "train", 0, 4)[size + 5]["input_ids"], rows[size + 5]["input_ids"])


def test_what_is_asked_for_was_listed(processor):
    names = single_token_names(processor.tokenizer)
    assert len(names) == len(set(names)) >= 256
    for items in (4, 256):
        one = recall(names, 0, 7, items, asked=20)
        listed = one.listing.split("\n")
        assert len(listed) == len({line.rsplit(" ", 1)[0] for line in listed}) == items
        assert len({question for question, _ in one.turns}) == len(one.turns) == min(20, items)
        for question, answer in one.turns:
            assert answer in listed and answer.rsplit(" ", 1)[0] == question.removesuffix("?")
    rows = RecallConversations(processor, 0, batch_size=2)
    lengths = [len(rows[i]["input_ids"]) for i in range(16)]
    assert max(lengths) < 2048 and max(lengths) > 4 * min(lengths)
    few = RecallConversations(processor, 0, max_items=8, num_names=10)
    texts = [processor.tokenizer.decode(few.row(i)["input_ids"]) for i in range(16)]
    assert all(line[0].isdigit() for text in texts for line in text.split("\n")[2:] if line[1:2] in " ?")
    assert any("9 " in text for text in texts)


def test_a_name_is_one_token_wherever_it_stands(processor):
    tokenizer, rows = processor.tokenizer, RecallConversations(processor, 3)
    new_line = tokenizer.convert_tokens_to_ids("\n")
    for index in range(5):
        row = rows.row(index)["input_ids"].tolist()
        _, *lines = (row[i + 1 : i + 3] for i, token in enumerate(row) if token == new_line)  # the system's, the rest
        words = [name for name, word in lines if tokenizer.decode([word]).strip() in WORDS]
        asked = [name for name, mark in lines if tokenizer.decode([mark]) == "?"]
        assert len(lines) == len(words) + len(asked) and set(asked) <= set(words)
        assert len(set(words)) + len(asked) == len(words)  # each in the list, and again in its answer


def test_shuffled_pictures_belong_to_other_questions(examples):
    swapped = evaluate.shuffled(examples)
    assert [one.question for one in swapped] == [one.question for one in examples]
    assert sum(a.pictures == b.pictures for a, b in zip(examples, swapped, strict=True)) < 5
    assert all(len(a.pictures) == len(b.pictures) for a, b in zip(examples, swapped, strict=True))
