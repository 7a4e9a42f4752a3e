"""Small conversations, pictures and processors that the tests of distillation data share."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import CONTROL_TOKENS, PICTURE_TOKENS, MmMambaTokenizer


TOKENIZER = Path(__file__).parent / "golden" / "tokenizer" / "tokenizer.model"


def processor_with(template, *tokens):
    tokenizer = MmMambaTokenizer(str(TOKENIZER), extra_special_tokens=[*CONTROL_TOKENS, *PICTURE_TOKENS, *tokens])
    tokenizer.chat_template = template
    images = MmMambaImageProcessorPil(size={"height": 16, "width": 16}, max_patches=6)
    return MmMambaProcessor(images, tokenizer, tokens_per_tile=4)


def picture(width=16, height=16):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def numbered(count, start=0):
    return [{"id": f"r{i}", "conversations": turns(f"Say {i}.", f"It is {i}.")} for i in range(start, start + count)]


def write_lines(file, items):
    file.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return file


def answers_of(row, tokenizer):
    """The text of each run of labels, with what ends it."""
    found, run = [], []
    for token in [*row["labels"].tolist(), -100]:
        if token != -100:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key]
