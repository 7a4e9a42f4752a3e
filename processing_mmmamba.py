"""Pictures and text to model inputs, and the prompt of a conversation.

`<image>` is a picture's placeholder in a prompt. It becomes `<img>`, one `<IMG_CONTEXT>` for each decoder row of the
picture's tiles, and `</img>`. Users cannot inject any of these: control tokens and placeholders that are typed in
messages are encoded as plain text (see `as_text`).
"""

import re

import jinja2
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_mmmamba import MmMambaImageProcessorKwargs
from .tokenization_mmmamba import PLAIN_TEXT_MARK, RESERVED_PIECE, MmMambaTokenizer


PLACEHOLDER = "<image>"
CONTENT_MARK = "\x00"  # marks a message's content in a rendered chat template; never encoded
NON_TEXT_KEYS = {"role", "type", "image", "url", "path", "base64"}  # of messages and their parts


def as_text(text: str, tokenizer: MmMambaTokenizer) -> str:
    """Marks `text` so that the tokenizer encodes control tokens and placeholders in it as plain text."""
    tokens = sorted([*tokenizer.get_added_vocab(), PLACEHOLDER], key=len, reverse=True)
    pattern = "|".join([*map(re.escape, tokens), RESERVED_PIECE.pattern])
    text = re.sub(pattern, lambda match: match[0][0] + PLAIN_TEXT_MARK + match[0][1:], text)
    # Marks at both ends keep adjacent texts from forming a control token.
    return PLAIN_TEXT_MARK + text + PLAIN_TEXT_MARK if text else text


def expand_placeholders(prompts: list[str], num_patches_list: list[int], tokens_per_tile: int) -> list[str]:
    """Replaces each `<image>`, in order over all prompts, by its picture's image tokens.

    Args:
        prompts: Rendered prompts.
        num_patches_list: Tiles of each picture, thumbnail included.
        tokens_per_tile: Decoder rows of a tile.

    Raises:
        ValueError: if placeholders and pictures differ in number.
    """
    placeholders = sum(prompt.count(PLACEHOLDER) for prompt in prompts)
    if placeholders != len(num_patches_list):
        raise ValueError(
            f"The prompt has {placeholders} {PLACEHOLDER} placeholders but there are {len(num_patches_list)} "
            f"pictures; write one {PLACEHOLDER} per picture."
        )
    counts = iter(num_patches_list)
    return [
        re.sub(PLACEHOLDER, lambda _: "<img>" + "<IMG_CONTEXT>" * (tokens_per_tile * next(counts)) + "</img>", prompt)
        for prompt in prompts
    ]


def answers_show_pictures(history: list[tuple[str, str]] | None, question: str, num_patches_list: list[int]) -> bool:
    """Whether `<image>` in answers is a placeholder, too; it is text if the questions' placeholders suffice."""
    questions = [*(earlier for earlier, _ in history or []), question]
    return sum(text.count(PLACEHOLDER) for text in questions) != len(num_patches_list)


def encode_conversation(
    tokenizer: MmMambaTokenizer,
    question: str,
    history: list[tuple[str, str]] | None,
    num_patches_list: list[int],
    tokens_per_tile: int,
    system_message: str | None = None,
) -> list[int]:
    """Token ids of a conversation up to the start of the answer.

    Args:
        tokenizer: Has the chat template.
        question: The last question; `<image>` is a placeholder here and in the history's questions.
        history: Earlier (question, answer) pairs; for `<image>` in answers see `answers_show_pictures`.
        num_patches_list: Tiles of each picture, in the order of the placeholders.
        tokens_per_tile: Decoder rows of a tile.
        system_message: Replaces the template's own.

    Raises:
        ValueError: if the question is empty, or placeholders and pictures differ in number.
    """
    in_answers = answers_show_pictures(history, question, num_patches_list)
    messages = [] if system_message is None else [{"role": "system", "content": system_message}]
    for earlier, answer in history or []:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    for message in messages:
        # Control tokens become text; placeholders stay placeholders, as in upstream's chat().
        content = message["content"]
        parts = content.split(PLACEHOLDER) if in_answers or message["role"] == "user" else [content]
        message["content"] = PLACEHOLDER.join(as_text(part, tokenizer) for part in parts)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (prompt,) = expand_placeholders([prompt], num_patches_list, tokens_per_tile)
    if not question.replace(PLACEHOLDER, "").strip():
        raise ValueError("The question is empty; ask something.")
    return tokenizer(prompt)["input_ids"]


def check_tiles(num_patches_list: list[int], pixel_values: Tensor | None) -> None:
    """Raises ValueError if `num_patches_list` does not add up to the tiles of `pixel_values`."""
    tiles = 0 if pixel_values is None else len(pixel_values)
    if sum(num_patches_list) != tiles:
        raise ValueError(
            f"num_patches_list counts {sum(num_patches_list)} tiles but pixel_values has {tiles}; give the number "
            "of tiles of each picture, thumbnail included."
        )


def decode_answer(tokenizer, ids: list[int], ends: list[int]) -> str:
    """The text of generated ids up to the first id that is in `ends`."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


class TemplateError(ValueError):
    """The chat template cannot be rendered turn by turn."""


def template_parts(tokenizer: MmMambaTokenizer, system_message: str | None = None) -> dict[str, str]:
    """The text that a chat template puts around messages, so that a conversation can be rendered turn by turn.

    Args:
        tokenizer: Has the chat template.
        system_message: Replaces the template's own.

    Returns:
        "start" (before the first question), "turn" (before a later one), "end of turn", "prompt" (before an answer to
        be generated), "answer" (before a given one), "end of answer"; and "empty start", "empty turn" and "empty
        answer" for empty messages.

    Raises:
        TemplateError: if the template renders a turn differently when more turns follow or precede it.
    """

    def render(*contents: str, prompt: bool = False) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        if system_message is not None:
            messages.insert(0, {"role": "system", "content": as_text(system_message, tokenizer)})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    try:
        start, _ = render(CONTENT_MARK).split(CONTENT_MARK)
        before, end_of_answer = render("a", CONTENT_MARK).split(CONTENT_MARK)
        turn, end_of_turn = render("a", "b", CONTENT_MARK).removeprefix(render("a", "b")).split(CONTENT_MARK)
        parts = {
            "start": start,
            "turn": turn,
            "end of turn": end_of_turn,
            "prompt": render(CONTENT_MARK, prompt=True).removeprefix(start + CONTENT_MARK + end_of_turn),
            "answer": before.removeprefix(start + "a" + end_of_turn),
            "end of answer": end_of_answer,
            "empty start": render(""),
            "empty turn": render("a", "b", "").removeprefix(render("a", "b")),
            "empty answer": render("a", "").removeprefix(render("a")),
        }
    except (ValueError, jinja2.TemplateError) as error:  # such as one that writes what is said twice
        raise TemplateError(f"The tokenizer's chat template cannot be rendered turn by turn ({error}).") from None
    joined = start + "a" + end_of_turn + parts["answer"] + "b" + end_of_answer
    joined += turn + "c" + end_of_turn + parts["answer"] + "d" + end_of_answer
    joined += turn + "e" + end_of_turn + parts["prompt"]
    if joined != render("a", "b", "c", "d", "e", prompt=True):
        raise TemplateError(
            "The tokenizer's chat template renders a turn otherwise when other turns surround it, so a state "
            "cannot continue the conversation; use chat() with its history."
        )
    return parts


class MmMambaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MmMambaImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012


class MmMambaProcessor(ProcessorMixin):
    """Combines an image processor and a tokenizer.

    Args:
        image_processor: Cuts pictures into tiles.
        tokenizer: Encodes text.
        tokens_per_tile: Decoder rows of a tile, as the model's `vision_config.tokens_per_tile`.
        chat_template: Jinja template that renders messages; the tokenizer's if not given.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        tokens_per_tile: int = 256,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.tokens_per_tile = tokens_per_tile
        self.image_token = "<IMG_CONTEXT>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Model inputs from prompts and pictures.

        Args:
            images: One picture or a list of them (PIL, array, path or URL), or a list of pictures per prompt.
            text: One prompt or a list of them, with one `<image>` per picture. Its control tokens stay control tokens.

        Returns:
            `input_ids` and `attention_mask` (batch, length), and `pixel_values` (tiles, 3, size, size) if there are
            pictures.

        Raises:
            ValueError: if placeholders and pictures differ in number, in all or in one prompt.
        """
        if text is None:
            raise ValueError(f"text is missing; give a prompt with one {PLACEHOLDER} per picture.")
        options = self._merge_kwargs(
            MmMambaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        return_tensors = options["text_kwargs"].pop("return_tensors", None)
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        if any(isinstance(row, (list, tuple)) for row in pictures):
            for prompt, row in zip(prompts, pictures, strict=True):
                if prompt.count(PLACEHOLDER) != len(row):
                    raise ValueError(
                        f"A prompt has {prompt.count(PLACEHOLDER)} {PLACEHOLDER} placeholders but {len(row)} "
                        f"pictures: {prompt[:80]!r}; write one {PLACEHOLDER} per picture."
                    )
            pictures = [picture for row in pictures for picture in row]
        vision, counts = {}, []
        if pictures:
            vision = self.image_processor(images=pictures, **options["images_kwargs"])
            counts = [int(count) for count in vision.pop("num_patches")]
        prompts = expand_placeholders(prompts, counts, self.tokens_per_tile)
        encoded = self.tokenizer(prompts, **options["text_kwargs"])
        return BatchFeature({**encoded, **vision}, tensor_type=return_tensors)

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, *, sanitize_control_tokens: bool = True, **kwargs
    ):
        """Renders messages, and encodes them and their pictures with `tokenize=True`.

        Typed control tokens and placeholders are plain text when encoded, unless `sanitize_control_tokens=False`.
        Other arguments and what is returned: see Transformers' `ProcessorMixin.apply_chat_template`.
        """
        if not conversation:
            raise ValueError("The conversation has no messages; give at least one.")
        if sanitize_control_tokens and kwargs.get("tokenize"):
            conversation = self._mark_texts(conversation)
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _mark_texts(self, messages):
        """A copy of (lists of) messages with `as_text` applied to all texts; pictures are shared, not copied."""
        if isinstance(messages, str):
            return as_text(messages, self.tokenizer)
        if isinstance(messages, (list, tuple)):
            return [self._mark_texts(message) for message in messages]
        if isinstance(messages, dict):
            return {key: value if key in NON_TEXT_KEYS else self._mark_texts(value) for key, value in messages.items()}
        return messages

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Number of tokens and tiles of pictures of these sizes, (height, width) in pixels, as vLLM asks for them."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[2 + self.tokens_per_tile * count for count in tiles], num_image_patches=tiles
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that calling the processor returns."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


MmMambaProcessor.register_for_auto_class()

__all__ = ["MmMambaProcessor", "encode_conversation"]
