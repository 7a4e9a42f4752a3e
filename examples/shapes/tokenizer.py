"""Trains the tokenizer of the picture world: SentencePiece BPE with byte fallback, small enough to read.

The corpus is the text of the world's own conversations, so that each word of a question is one token; anything else
that a user may type is split into letters and bytes.

    python -m mmmamba.examples.shapes.tokenizer        # writes tokenizer.model beside this file
"""

import io
import string
from pathlib import Path

import sentencepiece

from .world import COLORS, COUNT_WORDS, ORDINALS, SHAPES, conversation


MODEL_FILE = Path(__file__).with_name("tokenizer.model")
SYSTEM_MESSAGE = "You see pictures."
VOCAB_SIZE = 640


def corpus() -> list[str]:
    """The texts between special tokens, as they are encoded one by one."""
    pieces = []
    for index in range(4000):
        _, turns = conversation("train", 1, index)
        for question, answer in turns:
            pieces += [f"user\n{question}", f"\n{question}", f"assistant\n{answer}"]
    # Rare words must be frequent enough to become one piece, also at the start of an answer.
    words = [
        *COLORS,
        *SHAPES,
        *(f"{s}s" for s in SHAPES),
        *COUNT_WORDS,
        *ORDINALS,
        "yes",
        "no",
        "nothing",
        "top",
        "bottom",
    ]
    pieces += [f"assistant\n{word}" for word in words] * 1000
    pieces += [f"system\n{SYSTEM_MESSAGE}"] * 4000
    pieces += [" ".join(string.printable.strip())] * 10
    return pieces


def train() -> bytes:
    """The serialised SentencePiece model; the same bytes every time."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    MODEL_FILE.write_bytes(train())
