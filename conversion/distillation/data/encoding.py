"""One conversation as a row: the token ids that `chat()` makes, labels on the answers, tiles of the images."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from mmmamba.chat_template_mmmamba import (
    MARKS,
    PLACEHOLDER,
    RESERVED_PIECE,
    ChatTemplateMixin,
    as_text,
    template_errors_in_a_sentence,
)
from mmmamba.image_reading_mmmamba import read_image, to_rgb
from mmmamba.processing_mmmamba import MmMambaProcessor, expand_placeholders
from mmmamba.tokenization_mmmamba import MmMambaTokenizer, MmMambaTokenizerFast

from .formats import BadRow, error_reason, parse_record


# Noncharacters, which Unicode reserves for internal use. One that no text of a conversation holds delimits its answers
# in the rendered prompt, which is split there before it is encoded.
_DELIMITERS = [chr(code) for code in range(0xFDD3, 0xFDF0)]
# How streamed datasets name a file in an archive: `zip://a.jpg::hf://datasets/…`.
_ARCHIVES = {"bz2", "gzip", "lz4", "tar", "xz", "zip", "zstd"}


class ConversationEncoder:
    """Makes training rows of records; see `formats` for what a record may look like.

    Control tokens in a record's texts are encoded as plain text. Labels follow from where the chat template puts the
    answers, not from the tokens around them, so any template does, and answers may hold anything.

    Args:
        processor: Its tokenizer renders and encodes, its image processor cuts images into tiles. Or a tokenizer alone,
            any fast one with a chat template: conversations with images are bad rows.
        max_tokens: Longer conversations are bad rows.

    Raises:
        ValueError: if the tokenizer has no chat template or one that leaves answers out or changes them.
    """

    def __init__(self, processor: MmMambaProcessor | PreTrainedTokenizerBase, max_tokens: int | None = None):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor = getattr(processor, "image_processor", None)
        self.tokens_per_tile, self.max_tokens = getattr(processor, "tokens_per_tile", 0), max_tokens
        self._sanitizes = isinstance(self.tokenizer, ChatTemplateMixin)
        self._uses_offsets = not isinstance(self.tokenizer, MmMambaTokenizer | MmMambaTokenizerFast)
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, which conversations need; put its chat_template.jinja into the "
                "teacher's folder, or train on documents."
            )
        if self._uses_offsets and not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is no fast tokenizer, so it cannot tell which tokens are answers; "
                "put its tokenizer.json into the teacher's folder."
            )
        self._control_tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self._control_tokens)) or "(?!)")  # that matches nothing
        self._trims_answers = False
        self._turn_end = self._find_turn_end()
        self._trims_answers = self._find_trimming()

    def __call__(
        self,
        record: dict[str, Any],
        root: str | Path = ".",
        max_patches: int | None = None,
        any_path: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The row of a record.

        Args:
            record: Of any known format.
            root: Folder that image paths start at.
            max_patches: Largest number of tiles of all its images together, thumbnails not counted, but at least one
                of each; if not given, what the image processor allows for each.
            any_path: Whether images may be outside of `root`, and at URLs.

        Returns:
            `input_ids` (length,) int64; `labels` (length,) int64, -100 but on the answers' tokens and the token that
            ends each answer; `pixel_values` (tiles, 3, size, size) fp32, or uint8 if the image processor does not
            normalise, with 0 tiles if there are no images, and not there without an image processor.

        Raises:
            BadRow: if the record cannot become a row, in one sentence.
        """
        conversation = parse_record(record)
        if self.image_processor is None:
            if conversation.images:
                raise BadRow("it has images, which the model cannot read: its folder has no image processor")
            return self._as_row(*self._encode(self._render(conversation.messages, literal_placeholders=True)))
        images = [self._load_image(image, Path(root), any_path) for image in conversation.images]
        size = self.image_processor.size
        num_patches, pixel_values = [], torch.zeros(0, 3, size["height"], size["width"])
        if images:
            limit = {} if max_patches is None else {"max_patches": max(1, max_patches // len(images))}
            try:
                vision = self.image_processor(images, return_tensors="pt", **limit)
            except ValueError as error:
                raise BadRow(f"its images cannot be cut into tiles ({error_reason(error)})") from None
            num_patches, pixel_values = vision["num_patches"].tolist(), vision["pixel_values"]
            if pixel_values.dtype != torch.uint8:
                pixel_values = pixel_values.float()
        pieces = self._render(conversation.messages, conversation.literal_placeholders)
        row = self._as_row(*self._encode(expand_placeholders(pieces, num_patches, self.tokens_per_tile)))
        return row | {"pixel_values": pixel_values}

    def _as_row(self, ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise BadRow(f"it has {len(ids)} tokens, more than max_tokens={self.max_tokens}")
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _load_image(self, image: Any, root: Path, any_path: bool) -> Image.Image:
        if isinstance(image, dict):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        try:
            if isinstance(image, Image.Image):
                return to_rgb(image)
            if isinstance(image, (bytes, bytearray)):
                return read_image(image)
            if isinstance(image, (str, os.PathLike)):
                return read_image(_locate(os.fspath(image), root, any_path))
        except BadRow:
            raise
        except Exception as error:  # file systems raise nearly anything
            raise BadRow(f"its image cannot be read: {error_reason(error).rstrip('.')}") from None
        raise BadRow(f"its image is no path, bytes or PIL image but {type(image).__name__}")

    def _render(self, messages: list[dict[str, Any]], literal_placeholders: bool) -> list[str]:
        """The prompt split at the answers' starts and ends: every second piece is an answer."""
        texts = [
            part if isinstance(part, str) else part.get("text", "")
            for message in messages
            for part in ([message["content"]] if isinstance(message["content"], str) else message["content"])
        ]
        delimiter = next((one for one in _DELIMITERS if not any(one in text for text in texts)), None)
        if delimiter is None:
            raise BadRow("its texts hold all characters that Unicode reserves for internal use")
        try:
            delimited = self._delimit(messages, delimiter, literal_placeholders)
            if self._sanitizes:
                prompt = self.tokenizer.apply_chat_template(delimited, tokenize=False, sanitize_control_tokens=False)
            else:
                with template_errors_in_a_sentence():
                    prompt = self.tokenizer.apply_chat_template(delimited, tokenize=False)
            pieces = prompt.split(delimiter)
        except ValueError as error:
            raise BadRow(f"it cannot be rendered ({error_reason(error)})") from None
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(pieces) != 2 * answers + 1:
            raise ValueError("The chat template leaves out answers or repeats them; give one that renders each once.")
        return pieces

    def _delimit(
        self, messages: list[dict[str, Any]], delimiter: str, literal_placeholders: bool
    ) -> list[dict[str, Any]]:
        """The messages with their texts marked as text, and with delimiters around the answers."""
        delimited = []
        for message in messages:
            around = delimiter if message["role"] == "assistant" else ""
            content = message["content"]
            if around and self._trims_answers:  # which the delimiters would hinder
                content = _trimmed(content)
            if isinstance(content, str):
                # As in chat(): control tokens become text, placeholders keep their meaning.
                parts = [content] if literal_placeholders else content.split(PLACEHOLDER)
                content = around + PLACEHOLDER.join(as_text(part, self.tokenizer) for part in parts) + around
            else:
                content = [
                    part | {"text": as_text(part["text"], self.tokenizer)} if part["type"] == "text" else part
                    for part in content
                ]
                if not self._sanitizes:  # other models' templates may know strings only
                    content = "".join(part.get("text", PLACEHOLDER) for part in content)
                    content = around + content + around
                elif around:
                    content[0] = {"type": "text", "text": around + content[0]["text"]}
                    content[-1] = {"type": "text", "text": content[-1]["text"] + around}
            delimited.append({"role": message["role"], "content": content})
        return delimited

    def _encode(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and labels: ids of answers and of the tokens that end them, -100 elsewhere."""
        if self._uses_offsets:
            return self._encode_by_offsets(pieces)
        prompt = "".join(pieces)
        tokens = self.tokenizer.tokenize(prompt)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        # A control token in the prompt is one token, whatever stands around it. So control tokens align offsets in the
        # text with indices of tokens, and the text between two of them is encoded on its own.
        starts = [match.start() for match in self._control.finditer(prompt)]
        known = set(self._control_tokens)
        indices = [index for index, token in enumerate(tokens) if token in known]
        if len(starts) != len(indices):
            raise ValueError("The tokenizer joins or drops control tokens of the chat template.")

        def tokens_before(offset: int) -> int:
            """How many tokens hold nothing of the prompt from `offset` on."""
            last = bisect_right(starts, offset) - 1
            start = starts[last] if last >= 0 else 0
            index = indices[last] if last >= 0 else 0
            if offset == start:
                return index
            # The text up to here, encoded alone, may end in other tokens than within the whole: one can span `offset`.
            for token in self.tokenizer.tokenize(prompt[start:offset]):
                if index == len(tokens) or tokens[index] != token:
                    break
                index += 1
            return index

        labels = [-100] * len(ids)
        for start, end in self._answers(pieces):
            answer = slice(tokens_before(start), tokens_before(end))
            labels[answer] = ids[answer]
        return ids, labels

    def _encode_by_offsets(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """The same with any fast tokenizer."""
        prompt = "".join(pieces)
        encoded = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False, add_special_tokens=False)
        # Marks keep control tokens in texts apart. Other tokenizers than ours encode them, too.
        in_marks = {match.start() for match in MARKS.finditer(prompt)}
        tokens = [
            (index, end)
            for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if not (start in in_marks and end == start + 1)
        ]
        ids = [index for index, _ in tokens]
        ends = list(accumulate((end for _, end in tokens), max))  # added special tokens are at (0, 0)
        labels = [-100] * len(ids)
        for start, end in self._answers(pieces):
            answer = slice(bisect_right(ends, start), bisect_right(ends, end))
            labels[answer] = ids[answer]
        return ids, labels

    def _answers(self, pieces: list[str]) -> Iterator[tuple[int, int]]:
        """Where answers, with what ends them, start and end in the prompt."""
        offset = 0
        for number, piece in enumerate(pieces):
            end = offset + len(piece)
            if number % 2:
                ended = pieces[number + 1].startswith(self._turn_end)
                yield offset, end + (len(self._turn_end) if ended else 0)
            offset = end

    def _find_trimming(self) -> bool:
        """Whether the chat template removes white space around answers."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "\n answer \n"}]
        with template_errors_in_a_sentence():
            return "\n answer \n" not in self.tokenizer.apply_chat_template(messages, tokenize=False)

    def _find_turn_end(self) -> str:
        """What the chat template writes after an answer, up to and with its first control token; empty without one."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        tail = self._render(messages, literal_placeholders=True)[-1]
        ends = [match.end() for pattern in (self._control, RESERVED_PIECE) if (match := pattern.search(tail))]
        return tail[: min(ends)] if ends else tail


def _trimmed(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content.strip()
    parts = list(content)
    for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and parts[index]["type"] == "text":
            parts[index] = parts[index] | {"text": strip(parts[index]["text"])}
    return parts


def _locate(path: str, root: Path, any_path: bool) -> str | bytes:
    """An image's file as `read_image` takes it, or its bytes. Raises BadRow if a record must not name it.

    A record may name files in `root` and on the Hub, and in archives there, unless it may name `any_path`.
    """
    *archives, file = path.split("::")
    is_url = "://" in file
    if not is_url:
        file = os.path.abspath(root / file)  # without `..`
    may_read = file.startswith("hf://") if is_url else Path(file).is_relative_to(os.path.abspath(root))
    if not any_path and not (may_read and all(archive.split("://")[0] in _ARCHIVES for archive in archives)):
        kind = "a URL" if is_url else f"outside of {root}"
        raise BadRow(f"its image {path} is {kind}, which `image_paths: any` in the data's entry would allow")
    if archives or (is_url and not file.startswith(("http://", "https://"))):
        with fsspec.open("::".join([*archives, file]), "rb") as opened:
            return opened.read()
    if not is_url and not os.path.exists(file):
        raise BadRow(f"its image {file} does not exist")
    return file
