"""The formats of conversations, told apart record by record.

- LLaVA and InternVL: `{"image": "a.jpg" or [], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}`
- VLM-SFT (TRL): `{"messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...], "images": [...]}`
- the same with plain text: `{"messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...], "images": [...]}`

`<image>` in a text is a placeholder for an image, unless some content of the record is a list of parts: there, it is
text. Images without a placeholder go in front of the first question, as in `chat()`. An image is a path, a PIL image,
bytes, or `{"bytes": ..., "path": ...}`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import UnidentifiedImageError

from mmmamba.chat_template_mmmamba import PLACEHOLDER


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A record that cannot become a row; says why in one sentence."""


def error_reason(error: Exception) -> str:
    """Why an image could not be read, the same on every run."""
    if isinstance(error, UnidentifiedImageError):  # its text holds a memory address
        return "it is no image that Pillow knows"
    return str(error).split("\n")[0] or type(error).__name__


@dataclass
class Conversation:
    """A record in the form that chat templates take.

    Args:
        messages: `role` and `content` each; content is text, or parts `{"type": "image"}` and `{"type": "text", ...}`.
        images: In the order of their placeholders or parts.
        literal_placeholders: Whether `<image>` in a text is text, because the images are parts.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    literal_placeholders: bool


def parse_record(record: dict[str, Any]) -> Conversation:
    """A record of any known format as messages and images.

    Raises:
        BadRow: if it is of none, or its turns, answers, placeholders and images do not fit together.
    """
    if not isinstance(record, dict):
        raise BadRow(f"the record is no object with keys but {type(record).__name__}")
    if record.get("video") or record.get("videos"):
        raise BadRow("the record has a video, which the model cannot read")
    turns = record.get("conversations")
    turns = record.get("messages") if turns is None else turns
    if turns is None:
        raise BadRow(
            f"the record has neither conversations nor messages but {', '.join(map(str, record)) or 'nothing'}"
        )
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRow("the conversation is empty")
    images, part_images, messages = _record_images(record), [], []
    for number, turn in enumerate(turns, start=1):
        messages.append(_parse_turn(turn, number, part_images))
    _check_turns(messages)
    if any(isinstance(message["content"], list) for message in messages):
        return Conversation(messages, _assign_images(messages, part_images, images), literal_placeholders=True)
    placeholders = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if images and not placeholders:
        question = _first_question(messages)
        question["content"] = PLACEHOLDER * len(images) + "\n" + question["content"]
    elif placeholders != len(images):
        raise BadRow(f"the record has {placeholders} {PLACEHOLDER} placeholders but {len(images)} images")
    if any(PLACEHOLDER in message["content"] for message in messages if message["role"] == "assistant"):
        raise BadRow("an answer holds an image; images belong into questions")
    return Conversation(messages, images, literal_placeholders=False)


def _record_images(record: dict[str, Any]) -> list[Any]:
    found = [record[key] for key in ("image", "images") if record.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise BadRow("the record has both image and images")
    return [image for value in found for image in (value if isinstance(value, (list, tuple)) else [value])]


def _parse_turn(turn: Any, number: int, part_images: list[Any]) -> dict[str, Any]:
    """One turn as a message. Appends the image of each image part to `part_images`, None where it has none."""
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is no object with keys but {type(turn).__name__}")
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"message {number} has the unknown role {role!r}")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = [_parse_part(part, number, part_images) for part in content]
        if ROLES[role] == "assistant" and any(part["type"] == "image" for part in content):
            raise BadRow("an answer holds an image; images belong into questions")
    elif not isinstance(content, str):
        raise BadRow(f"message {number} has no text")
    return {"role": ROLES[role], "content": content}


def _parse_part(part: Any, number: int, part_images: list[Any]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise BadRow(f"message {number} has a part that is neither text nor image but {kind!r}")
    # Tables fill the keys that a part does not have with None.
    images = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    if part.get("bytes") is not None:
        images = [{"bytes": part["bytes"], "path": part.get("path")}]
    if images and isinstance(images[0], dict) and all(value is None for value in images[0].values()):
        images = []
    part_images.append(images[0] if images else None)
    return {"type": "image"}


def _check_turns(messages: list[dict[str, Any]]) -> None:
    previous_role, answers = None, 0
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if role == "system":
            if number > 1:
                raise BadRow(f"message {number} is a system message but not the first one")
            continue
        if previous_role is None and role == "assistant":
            raise BadRow("the conversation begins with an answer")
        if role == previous_role:
            kind = "answers" if role == "assistant" else "questions"
            raise BadRow(f"messages {number - 1} and {number} are two {kind} in a row")
        previous_role = role
        answers += role == "assistant"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not any(part["type"] == "image" or part["text"].strip() for part in parts):
            raise BadRow(f"message {number}, {'an answer' if role == 'assistant' else 'a question'}, is empty")
    if not answers:
        raise BadRow("the conversation has no answer")


def _first_question(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return next(message for message in messages if message["role"] == "user")


def _assign_images(messages: list[dict[str, Any]], part_images: list[Any], images: list[Any]) -> list[Any]:
    """The images of all image parts in order. Without any part, parts are put in front of the first question."""
    if images and not part_images:
        question = _first_question(messages)
        content = question["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        question["content"] = [{"type": "image"} for _ in images] + content
        return images
    missing = sum(image is None for image in part_images)
    if missing != len(images):
        raise BadRow(f"the record has {missing} image parts without an image of their own but {len(images)} images")
    remaining = iter(images)
    return [next(remaining) if image is None else image for image in part_images]
