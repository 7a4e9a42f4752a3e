"""What stands between messages and a chat template: checks, and text that stays text.

A chat template writes control tokens (`<|im_start|>`, `<img>`, …) around what users say. A user who types such a token
must not be able to end a turn or to insert a picture, so texts are marked (`as_text`) before they are rendered, and
the tokenizers encode marked tokens as plain text. The marks are Unicode noncharacters, which texts should not contain:
they are removed from what users say, and before text is encoded.
"""

import dataclasses
import re
import traceback
from contextlib import contextmanager

import jinja2


PLAIN_TEXT_MARK = "\ufdd0"  # inside a control token: it is not recognised
BOUNDARY_MARK = "\ufdd1"  # between two characters: they are encoded apart
CONTENT_MARK = "\ufdd2"  # the place of a message in a rendered template; never encoded
MARKS = re.compile("[\ufdd0-\ufdd2]")
SURROGATE = re.compile("[\ud800-\udfff]")

# InternLM2's SentencePiece model has these as pieces, some with the ids of control tokens.
RESERVED_PIECE = re.compile(r"\[UNUSED_TOKEN_\d+\]")
START_OF_RESERVED_PIECE = re.compile(
    r"(?:\[UNUSED_TOKEN_\d*|" + "|".join(re.escape("[UNUSED_TOKEN"[:length]) for length in range(13, 0, -1)) + r")\Z"
)

PLACEHOLDER = "<image>"  # what users write for a picture
VIDEO_PLACEHOLDER = "<video>"
ROLES = ("system", "developer", "user", "assistant")
PART_TYPES = ("text", "image", "image_url", "video")


def check_text(text: str, name: str = "A text") -> str:
    """Returns `text`. Raises ValueError if it is no string, or one that cannot be encoded as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80} ({type(text).__name__}); give a string.")
    if surrogate := SURROGATE.search(text):
        raise ValueError(
            f"{name} has a lone surrogate, U+{ord(surrogate[0]):04X}, at character {surrogate.start()}, which stands "
            "for no character; decode the text correctly, or with errors='replace'."
        )
    return text


def check_call(question="", history=None, system_message=None, num_patches_list=()) -> None:
    """Raises ValueError for what is no text, no list of (question, answer) pairs, or no number of tiles."""
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history={history!r:.80} is no list of (question, answer) pairs; give one, or None.")
    for pair in history or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"The history has {pair!r:.80}, which is no (question, answer) pair; give pairs.")
        for text in pair:
            check_text(text, "history")
    check_text(question, "question")
    if system_message is not None:
        check_text(system_message, "system_message")
    if num_patches_list is not None and not isinstance(num_patches_list, (list, tuple)):
        raise ValueError(f"num_patches_list={num_patches_list!r:.80} is no list; give the number of tiles by picture.")
    for count in num_patches_list or ():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"num_patches_list has {count!r:.80}; give the number of tiles of each picture, 1 or more."
            )


def whole_numbers(num_patches_list):
    """`num_patches_list` as Python numbers in lists: a tensor or an array is what image processors return."""
    if hasattr(num_patches_list, "tolist"):
        return num_patches_list.tolist()
    if isinstance(num_patches_list, (list, tuple)):
        return [whole_numbers(count) for count in num_patches_list]
    return num_patches_list


def as_text(text: str, tokenizer) -> str:
    """Marks `text` so that the tokenizer encodes control tokens and placeholders in it as plain text.

    Other text is left as it is, so that offsets in it stay right.

    Raises:
        ValueError: see `check_text`.
    """
    text = MARKS.sub("", check_text(text))
    tokens = sorted([*tokenizer.get_added_vocab(), PLACEHOLDER, VIDEO_PLACEHOLDER], key=len, reverse=True)
    tokens = [token for token in tokens if not RESERVED_PIECE.fullmatch(token)]
    has_reserved_pieces = getattr(tokenizer, "has_reserved_pieces", False)
    patterns = [*map(re.escape, tokens), *([RESERVED_PIECE.pattern] if has_reserved_pieces else [])]

    def mark(match: re.Match) -> str:
        token = match[0]
        if RESERVED_PIECE.fullmatch(token):  # a piece of the model, not only a token beside it: spell it
            return BOUNDARY_MARK + BOUNDARY_MARK.join(token) + BOUNDARY_MARK
        return token[0] + PLAIN_TEXT_MARK + token[1:]

    text = re.sub("|".join(patterns), mark, text)
    # A token must not come from the end of this text and the beginning of the next.
    if has_reserved_pieces and START_OF_RESERVED_PIECE.search(text):
        return text + BOUNDARY_MARK
    starts = any(text.endswith(token[:length]) for token in tokens for length in range(1, len(token)))
    return text + PLAIN_TEXT_MARK if starts else text


def mark_texts(messages, tokenizer, parts_only: bool = False):
    """A copy of (lists of) messages with `as_text` applied to what is said; pictures are shared, not copied.

    Args:
        messages: One message, a list of them, or a list of such lists.
        tokenizer: Has the control tokens.
        parts_only: Leave contents that are strings as they are: they may hold placeholders such as `<image>`.
    """
    if isinstance(messages, str):
        return messages if parts_only else as_text(messages, tokenizer)
    if isinstance(messages, (list, tuple)):
        return [mark_texts(message, tokenizer, parts_only) for message in messages]
    if isinstance(messages, dict):
        return {
            key: mark_texts(value, tokenizer, parts_only and key != "text") if key in ("content", "text") else value
            for key, value in messages.items()
        }
    return messages


def check_conversation(conversation, may_lack_content: bool = False) -> list:
    """A conversation as a list of messages, or several as a list of such lists.

    Messages may be dicts, dataclasses, or objects with a method `model_dump`, as OpenAI's. Keys that are None are
    left out.

    Args:
        conversation: The messages.
        may_lack_content: Whether a message may say nothing, as for a template that shows other keys of it.

    Raises:
        ValueError: if these are no messages, or a message has no role, or content of a kind that is not known.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(
            f"The conversation is {conversation!r:.80}; give a list of messages such as "
            "{'role': 'user', 'content': 'Hello'}."
        )
    if not conversation:
        raise ValueError(
            "The conversation has no messages; give a list such as [{'role': 'user', 'content': 'Hello'}]."
        )
    if isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"):
        return [check_conversation(one, may_lack_content) for one in conversation]
    return [_check_message(message, may_lack_content) for message in conversation]


def _as_dict(message):
    if hasattr(message, "model_dump"):
        message = message.model_dump()
    elif dataclasses.is_dataclass(message):
        message = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}


def _check_message(message, may_lack_content: bool) -> dict:
    message = _as_dict(message)
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"{message!r:.80} is no message; write {{'role': 'user', 'content': 'Hello'}}.")
    if "content" not in message and not may_lack_content:
        raise ValueError(f"A message of role {message['role']!r} has no content; give a string, which may be empty.")
    content = message.get("content", "")
    if isinstance(content, str):
        check_text(content)
        return message
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"A message of role {message['role']!r} has the content {content!r:.80}; give a string or a list of "
            "parts such as {'type': 'text', 'text': 'Hello'}."
        )
    message["content"] = content = [_as_dict(part) for part in content]
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
            raise ValueError(f"{part!r:.80} is no part of a message; its type must be one of {', '.join(PART_TYPES)}.")
        if part["type"] == "text":
            check_text(part.get("text"), "The text of a message")
    return message


def check_template_arguments(template: str | dict | None, **arguments) -> None:
    """Raises ValueError for the first argument that is given but that the template does not use."""
    texts = " ".join(template.values()) if isinstance(template, dict) else template or ""
    for name, value in arguments.items():
        if value is not None and not re.search(rf"\b{re.escape(name)}\b", texts):
            raise ValueError(
                f"The chat template does not use {name}={value!r:.60}; leave it out, or give a template that does."
            )


def check_tool_calls(template: str | dict | None, conversation: list) -> None:
    """Raises ValueError if messages have `tool_calls` and the template does not use them."""
    for message in conversation:
        if isinstance(message, list):
            check_tool_calls(template, message)
        else:
            check_template_arguments(template, tool_calls=message.get("tool_calls"))


@contextmanager
def template_errors_in_a_sentence():
    """Raises ValueError for what a chat template refuses, and for faults in it."""
    try:
        yield
    except Exception as error:
        in_template = any(frame.filename == "<template>" for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(error, jinja2.TemplateError) or in_template:
            raise ValueError(
                f"The chat template cannot render this conversation ({str(error).rstrip('.')})."
            ) from None
        raise


def _check_texts(*texts) -> None:
    for text in texts:
        for one in text if isinstance(text, (list, tuple)) else [] if text is None else [text]:
            if not isinstance(one, (list, tuple)):  # pairs, and texts that are split into words
                check_text(one)


class ChatTemplateMixin:
    """`apply_chat_template` and calls of a tokenizer that refuse what cannot be encoded."""

    def __call__(self, text=None, text_pair=None, **kwargs):
        """As in Transformers, but that a prompt that starts with the beginning token does not get another.

        Raises:
            ValueError: for texts that cannot be encoded as UTF-8.
        """
        _check_texts(text, text_pair)
        return super().__call__(text, text_pair, **self._without_second_bos(text, kwargs))

    def encode(self, text, text_pair=None, **kwargs) -> list[int]:
        """As in Transformers, with the same exception and errors as a call."""
        _check_texts(text, text_pair)
        return super().encode(text, text_pair, **self._without_second_bos(text, kwargs))

    def tokenize(self, text: str, *args, **kwargs) -> list[str]:
        """As in Transformers. Raises ValueError for a text that cannot be encoded as UTF-8."""
        return super().tokenize(check_text(text), *args, **kwargs)

    def _without_second_bos(self, text, options: dict) -> dict:
        """The same options, or with `add_special_tokens=False` if every text is a prompt with its beginning token.

        The beginning token alone is no prompt: upstream's tokenizer puts another before it, and so does this.
        """
        prompts, bos = [text] if isinstance(text, str) else text, self.bos_token
        begins = bos and prompts and all(isinstance(x, str) and x.startswith(bos) and x != bos for x in prompts)
        return {"add_special_tokens": False, **options} if begins else options

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """Renders messages and encodes them; arguments and what is returned as in Transformers.

        Args:
            sanitize_control_tokens: Whether control tokens and placeholders that are typed in messages are encoded as
                plain text. With `tokenize=False` the text is marked so that it will be (servers encode it later), but
                for contents that are one string: they may hold placeholders, which the processor replaces.

        Raises:
            ValueError: if the messages cannot be rendered, or the template does not use `tools`, `documents` or
                another keyword that is given.
        """
        conversation = check_conversation(conversation, may_lack_content=chat_template is not None)
        template = chat_template or self.chat_template
        options = {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
        options |= {"return_assistant_tokens_mask", "load_audio_from_video"}  # which Transformers' server says to all
        for_template = {name: value for name, value in kwargs.items() if name not in options}
        check_template_arguments(template, tools=tools, documents=documents, **for_template)
        check_tool_calls(template, conversation)
        if sanitize_control_tokens:
            conversation = mark_texts(conversation, self, parts_only=not tokenize)
        with template_errors_in_a_sentence():
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                **kwargs,
            )


__all__ = ["ChatTemplateMixin", "as_text"]
