"""Picture conversations that teach another way to answer: counts in digits, which the shipped models write as words.

    python -m mmmamba.examples.finetune.house_style runs/style

writes `train.jsonl` and `test.jsonl` beside `pictures/`, in the format of LLaVA and InternVL. No picture of the test
occurs in training. Every second question asks for a count; the others are answered as the shipped models do.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from mmmamba.examples.shapes.world import COUNT_WORDS, Example, example


def write_data(folder: Path, num_train: int, num_test: int) -> None:
    """Writes conversations of one question each, and their pictures.

    Args:
        folder: Made if it does not exist.
        num_train: Questions to train on.
        num_test: Questions about held-out pictures.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for split, number in (("train", num_train), ("test", num_test)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for index, asked in enumerate(questions(split, number)):
                images = [f"pictures/{split}-{index}-{place}.png" for place in range(len(asked.pictures))]
                for picture, image in zip(asked.pictures, images, strict=True):
                    picture.draw().save(folder / image)
                said = [
                    {"from": "human", "value": "<image>" * len(images) + "\n" + asked.question},
                    {"from": "gpt", "value": in_digits(asked.answer)},
                ]
                file.write(json.dumps({"image": images, "conversations": said}) + "\n")


def questions(split: str, number: int) -> Iterator[Example]:
    """Questions of the picture world; every second one asks for a count."""
    index = -1
    for place in range(number):
        wants_count = place % 2 == 0
        while True:
            index += 1
            asked = example(split, 0, index)
            if (asked.answer in COUNT_WORDS) == wants_count:
                yield asked
                break


def in_digits(answer: str) -> str:
    """The answer `six` as `6`; one that is no count as it is."""
    return str(COUNT_WORDS.index(answer)) if answer in COUNT_WORDS else answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--train", type=int, default=800, metavar="N", help="questions to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=100, metavar="N", help="questions to test with (%(default)s)")
    args = parser.parse_args()
    write_data(args.folder, args.train, args.test)
    print(f"{args.folder} has {args.train} questions in train.jsonl and {args.test} in test.jsonl.")
