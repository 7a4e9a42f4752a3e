"""Pictures, videos and text to model inputs, and the prompt of a conversation.

A picture's placeholder in a prompt is `<image>`, or `<img><IMG_CONTEXT></img>` as the chat template writes it. It
becomes `<img>`, one `<IMG_CONTEXT>` for each decoder row of the picture's tiles, and `</img>`. A video's is `<video>`,
or `<img></img>` from the chat template; it becomes a line `Frame1: ` with a picture for each frame. Users cannot
inject any of these: control tokens and placeholders that are typed in messages are encoded as plain text (see
`chat_template_mmmamba.py`).
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs

from .chat_template_mmmamba import (
    CONTENT_MARK,
    MARKS,
    PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    as_text,
    check_conversation,
    check_template_arguments,
    check_tool_calls,
    mark_texts,
    template_errors_in_a_sentence,
)
from .image_processing_mmmamba import MmMambaImageProcessorKwargs
from .tokenization_mmmamba import MmMambaTokenizer
from .video_processing_mmmamba import MmMambaVideoProcessor, MmMambaVideoProcessorKwargs, is_video, list_videos
from .video_reading_mmmamba import check_sampling


# A picture or a video as users write it, as the chat template does (or a processor before), and a picture as
# Transformers' pipelines do.
PLACEHOLDERS = re.compile(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}|<img>(?:<IMG_CONTEXT>)*</img>|<IMG_CONTEXT>")
OF_VIDEOS = (VIDEO_PLACEHOLDER, "<img></img>")


def expand_placeholders(prompts: list[str], num_patches_list: list[int], tokens_per_tile: int) -> list[str]:
    """Replaces each picture's placeholder, in order over all prompts, by its picture's image tokens.

    Args:
        prompts: Rendered prompts.
        num_patches_list: Tiles of each picture, thumbnail included.
        tokens_per_tile: Decoder rows of a tile; 0 for a model that reads text only, which has no placeholders.

    Raises:
        ValueError: if placeholders and pictures differ in number.
    """
    if not tokens_per_tile:
        return prompts
    texts = iter(_placeholder_texts(prompts, num_patches_list, [], tokens_per_tile))
    return [PLACEHOLDERS.sub(lambda _: next(texts), prompt) for prompt in prompts]


def _placeholder_texts(
    prompts: list[str], pictures: list[int], videos: list[list[int]], tokens_per_tile: int
) -> list[str]:
    """What each placeholder becomes, in order over all prompts.

    Args:
        prompts: Rendered prompts.
        pictures: Tiles of each picture.
        videos: Tiles of each frame of each video.
        tokens_per_tile: Decoder rows of a tile.

    Raises:
        ValueError: if placeholders and pictures or videos differ in number.
    """
    found = [placeholder for prompt in prompts for placeholder in PLACEHOLDERS.findall(prompt)]
    of_videos = sum(placeholder in OF_VIDEOS for placeholder in found)
    for count, given, written, name in (
        (len(found) - of_videos, len(pictures), PLACEHOLDER, "picture"),
        (of_videos, len(videos), VIDEO_PLACEHOLDER, "video"),
    ):
        if count != given:
            raise ValueError(
                f"The prompt has {count} {written} placeholders but there are {given} {name}s; write one {written} "
                f"per {name}."
            )
    left_pictures, left_videos = iter(pictures), iter(videos)
    return [
        video_tokens(next(left_videos), tokens_per_tile)
        if placeholder in OF_VIDEOS
        else image_tokens(next(left_pictures) * tokens_per_tile)
        for placeholder in found
    ]


def video_tokens(num_patches_list: list[int], tokens_per_tile: int) -> str:
    """A video as it stands in a prompt: a line for each frame, numbered from 1, as in InternVL's examples.

    Args:
        num_patches_list: Tiles of each frame.
        tokens_per_tile: Decoder rows of a tile.
    """
    return "\n".join(
        f"Frame{number}: {image_tokens(tiles * tokens_per_tile)}" for number, tiles in enumerate(num_patches_list, 1)
    )


def image_tokens(count: int) -> str:
    """A picture of `count` decoder rows, as it stands in a prompt."""
    return "<img>" + "<IMG_CONTEXT>" * count + "</img>"


def original_offsets(offsets: list[tuple[int, int]], prompt: str, texts: Iterator[str]) -> list[tuple[int, int]]:
    """Offsets in a prompt, of tokens whose offsets are those in the prompt with its placeholders replaced by `texts`.

    All tokens of a picture or a video get the span of its placeholder.
    """
    pictures, grown = [], 0  # (start and end in the expanded prompt, start and end in the prompt)
    for match in PLACEHOLDERS.finditer(prompt):
        length = len(next(texts))
        start = match.start() + grown
        pictures.append((start, start + length, *match.span()))
        grown += length - len(match[0])
    starts = [picture[0] for picture in pictures]
    moved = []
    for start, end in offsets:
        before = bisect_right(starts, start) - 1
        if before < 0:
            moved.append((start, end))
            continue
        _, expanded_end, original_start, original_end = pictures[before]
        shift = original_end - expanded_end
        inside = start < expanded_end
        moved.append((original_start, original_end) if inside else (start + shift, end + shift))
    return moved


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
        question: The last question; `<image>` is a placeholder here and in the history's questions, unless the model
            reads text only.
        history: Earlier (question, answer) pairs; for `<image>` in answers see `answers_show_pictures`.
        num_patches_list: Tiles of each picture, in the order of the placeholders.
        tokens_per_tile: Decoder rows of a tile, 0 for a model that reads text only.
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
        has_places = tokens_per_tile > 0 and (in_answers or message["role"] == "user")
        parts = content.split(PLACEHOLDER) if has_places else [content]
        message["content"] = PLACEHOLDER.join(as_text(part, tokenizer) for part in parts)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (prompt,) = expand_placeholders([prompt], num_patches_list, tokens_per_tile)
    if not question.replace(PLACEHOLDER, "").strip():
        raise ValueError("The question is empty; ask something.")
    # The template writes the beginning token if chats have one, as everywhere in Transformers.
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def check_tiles(num_patches_list: list[int], pixel_values: Tensor | None) -> None:
    """Raises ValueError if `num_patches_list` does not count the tiles of `pixel_values`, or these are not finite."""
    tiles = 0 if pixel_values is None else len(pixel_values)
    if sum(num_patches_list) != tiles:
        raise ValueError(
            f"num_patches_list counts {sum(num_patches_list)} tiles but pixel_values has {tiles}; give the number "
            "of tiles of each picture, thumbnail included."
        )
    if pixel_values is not None and not pixel_values.isfinite().all():
        raise ValueError("pixel_values holds NaN or infinite values; give tiles as the image processor makes them.")


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
        answer" for empty messages. If the template trims messages, as Llama 3's does, "trimmed" names the roles.

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
    except ValueError as error:  # such as one that writes what is said twice
        raise TemplateError(f"The tokenizer's chat template cannot be rendered turn by turn ({error}).") from None
    spaces = "\n " + CONTENT_MARK + " \n"
    said = {"user": render(spaces), "assistant": render("a", spaces)}
    if trimmed := [role for role, text in said.items() if spaces not in text]:
        parts["trimmed"] = " ".join(trimmed)
    expected = {"user": (start, end_of_turn), "assistant": (before, end_of_answer)}
    faithful = all(
        said[role] == left + (spaces.strip() if role in trimmed else spaces) + right
        for role, (left, right) in expected.items()
    )
    joined = start + "a" + end_of_turn + parts["answer"] + "b" + end_of_answer
    joined += turn + "c" + end_of_turn + parts["answer"] + "d" + end_of_answer
    joined += turn + "e" + end_of_turn + parts["prompt"]
    if not faithful or joined != render("a", "b", "c", "d", "e", prompt=True):
        raise TemplateError(
            "The tokenizer's chat template renders a turn otherwise when other turns surround it, so a state "
            "cannot continue the conversation; use chat() with its history."
        )
    return parts


class MmMambaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MmMambaImageProcessorKwargs
    videos_kwargs: MmMambaVideoProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012


# What a call of the processor takes: of tokenizers, of the image and video processors, and of processors.
KEYWORDS = {
    *TextKwargs.__annotations__,
    *MmMambaImageProcessorKwargs.__annotations__,
    *MmMambaVideoProcessorKwargs.__annotations__,
    *MmMambaProcessorKwargs.__annotations__,
    *("text_kwargs", "images_kwargs", "common_kwargs"),
    *("return_mm_token_type_ids", "return_text_replacement_offsets"),
}


# What `apply_chat_template` takes besides.
TEMPLATE_KEYWORDS = {
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenize", "return_dict"),
    *("load_audio_from_video", "processor_kwargs"),
}


class MmMambaProcessor(ProcessorMixin):
    """Combines an image processor, a video processor and a tokenizer.

    Args:
        image_processor: Cuts pictures into tiles.
        tokenizer: Encodes text.
        video_processor: Cuts frames of videos into tiles; if not given, one with the image processor's tiles.
        tokens_per_tile: Decoder rows of a tile, as the model's `vision_config.tokens_per_tile`.
        chat_template: Jinja template that renders messages; the tokenizer's if not given.
    """

    valid_processor_kwargs = MmMambaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        tokens_per_tile: int = 256,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.tokens_per_tile = tokens_per_tile
        self.image_token, self.video_token = "<IMG_CONTEXT>", VIDEO_PLACEHOLDER
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if video_processor is None:
            names = ("image_mean", "image_std", "resample", "rescale_factor")
            alike = {name: getattr(image_processor, name) for name in names}
            size = {name: image_processor.size[name] for name in ("height", "width")}
            video_processor = MmMambaVideoProcessor(size=size, **alike)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, video_processor, chat_template=template)

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """Model inputs from prompts, pictures and videos.

        Args:
            images: One picture or a list of them (PIL, array, path or URL), or a list of pictures per prompt.
            text: One prompt or a list of them, with one `<image>` per picture and one `<video>` per video. Its control
                tokens stay control tokens; the beginning token is added unless a prompt starts with it.
            videos: One video or a list of them (path, URL, array or list of pictures; see `MmMambaVideoProcessor`), or
                a list of videos per prompt.

        Returns:
            `input_ids` and `attention_mask` (batch, length), and `pixel_values` (tiles, 3, size, size) if there are
            pictures or videos, in the order of their placeholders. With `return_offsets_mapping`, offsets are those in
            `text`; with `return_metadata`, `video_metadata` says which frames were taken.

        Raises:
            ValueError: if placeholders and pictures or videos differ in number, in all or in one prompt, if a picture
                is truncated, a video cannot be read, or for a keyword that is not known.
        """
        if text is None:
            raise ValueError(f"text is missing; give a prompt with one {PLACEHOLDER} per picture.")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if unknown := sorted(set(kwargs) - KEYWORDS):
            raise ValueError(
                f"The processor does not know {unknown[0]}={kwargs[unknown[0]]!r:.60}; give text, images, videos and "
                "keywords of the tokenizer and the image and video processors."
            )
        for group in ("images_kwargs", "videos_kwargs", "text_kwargs"):
            if unknown := sorted(set(kwargs.get(group) or ()) - KEYWORDS):
                raise ValueError(f"{group} has {unknown[0]!r}, which is no keyword of it; leave it out.")
        check_sampling(kwargs.get("num_frames"), kwargs.get("fps"))
        options = self._merge_kwargs(
            MmMambaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        for_text = options["text_kwargs"]
        return_tensors = for_text.pop("return_tensors", None)
        token_types = kwargs.get("return_mm_token_type_ids")
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            for_text.pop(name, None)
        prompts = [text] if isinstance(text, str) else list(text)
        pictures, videos = self._pictures_in_order(images, prompts), self._videos_in_order(videos, prompts)
        vision, counts, frames = {}, [], []
        if pictures:
            vision = self.image_processor(images=pictures, **options["images_kwargs"])
            counts = [int(count) for count in vision.pop("num_patches")]
        if videos:
            of_videos = self.video_processor(videos, **options["videos_kwargs"])
            of_frames = iter(of_videos.pop("num_patches"))
            frames = [[int(next(of_frames)) for _ in range(int(number))] for number in of_videos.pop("num_frames")]
        texts = _placeholder_texts(prompts, counts, frames, self.tokens_per_tile)
        if videos:
            tiles = self._tiles_in_order(prompts, vision, counts, of_videos, frames)
            vision = {**vision, **of_videos, "pixel_values": tiles}
        left = iter(texts)
        expanded = [PLACEHOLDERS.sub(lambda _: next(left), prompt) for prompt in prompts]
        bos = self.tokenizer.bos_token
        if "add_special_tokens" not in kwargs and bos and any(prompt.startswith(bos) for prompt in prompts):
            for_text["add_special_tokens"] = False  # the chat template has written them
            expanded = [prompt if prompt.startswith(bos) else bos + prompt for prompt in expanded]
        encoded = self.tokenizer(expanded, **for_text)
        self._check_truncation(expanded, encoded["input_ids"], for_text.get("max_length"))
        if "offset_mapping" in encoded:
            left = iter(texts)
            encoded["offset_mapping"] = [
                original_offsets(offsets, prompt, left)
                for offsets, prompt in zip(encoded["offset_mapping"], prompts, strict=True)
            ]
        if token_types:
            picture = set(self.tokenizer.convert_tokens_to_ids(["<img>", self.image_token, "</img>"]))
            encoded["mm_token_type_ids"] = [[int(index in picture) for index in row] for row in encoded["input_ids"]]
        return BatchFeature({**encoded, **vision}, tensor_type=return_tensors)

    def _pictures_in_order(self, images, prompts: list[str]) -> list:
        """All pictures in one list. Raises ValueError if rows of pictures do not fit the prompts."""
        pictures = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        if not any(isinstance(row, (list, tuple)) for row in pictures):
            return list(pictures)
        return self._rows_in_order("picture", pictures, prompts)

    def _videos_in_order(self, videos, prompts: list[str]) -> list:
        """All videos in one list. Raises ValueError for what is no video, or rows that do not fit the prompts."""
        if videos is None or (isinstance(videos, (list, tuple)) and not videos):
            return []
        rows = isinstance(videos, (list, tuple)) and all(
            isinstance(row, (list, tuple)) and (not row or not is_video(row)) for row in videos
        )
        if not rows:
            return list_videos(videos)
        return list_videos(self._rows_in_order("video", videos, prompts))

    def _rows_in_order(self, kind: str, rows: list, prompts: list[str]) -> list:
        written = PLACEHOLDER if kind == "picture" else VIDEO_PLACEHOLDER
        if len(rows) != len(prompts):
            raise ValueError(
                f"There are {len(rows)} lists of {kind}s for {len(prompts)} prompts; give one list per prompt, "
                f"an empty one where there is no {kind}."
            )
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not isinstance(row, (list, tuple)):
                raise ValueError(f"images[{index}] is {row!r:.60}; give a list, as for the other prompts.")
            found = [placeholder in OF_VIDEOS for placeholder in PLACEHOLDERS.findall(prompt)]
            if (placeholders := found.count(kind == "video")) != len(row):
                raise ValueError(
                    f"A prompt has {placeholders} {written} placeholders but {len(row)} {kind}s: "
                    f"{MARKS.sub('', prompt)[:80]!r}; write one {written} per {kind}."
                )
        return [one for row in rows for one in row]

    def _tiles_in_order(self, prompts, vision, counts: list[int], of_videos, frames: list[list[int]]) -> list[Tensor]:
        """The tiles of pictures and videos in the order of their placeholders."""
        of_pictures = iter([torch.as_tensor(tile) for tile in vision.get("pixel_values", [])])
        of_videos = iter([torch.as_tensor(tile) for tile in of_videos["pixel_values"]])
        counts, sums = iter(counts), iter([sum(video) for video in frames])
        tiles = []
        for prompt in prompts:
            for placeholder in PLACEHOLDERS.findall(prompt):
                video = placeholder in OF_VIDEOS
                tiles += islice(of_videos, next(sums)) if video else islice(of_pictures, next(counts))
        return tiles

    def _check_truncation(self, prompts: list[str], input_ids: list[list[int]], max_length: int | None) -> None:
        """Raises ValueError if image tokens were cut off, for which there are pictures."""
        for prompt, ids in zip(prompts, input_ids, strict=True):
            expected, found = prompt.count(self.image_token), list(ids).count(self.image_token_id)
            if found != expected:
                raise ValueError(
                    f"max_length={max_length} leaves {found} of the {expected} image tokens of a prompt; allow more "
                    "tokens, or fewer tiles by max_patches."
                )

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools=None,
        documents=None,
        *,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """Renders messages, and encodes them and their pictures with `tokenize=True`.

        Typed control tokens and placeholders are plain text when encoded, unless `sanitize_control_tokens=False`.
        Other arguments and what is returned: see Transformers' `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: if the messages cannot be rendered, or the template does not use `tools` or `documents`.
        """
        conversation = check_conversation(conversation, may_lack_content=chat_template is not None)
        for name in ("images", "videos"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}={kwargs[name]!r:.60} stands beside the messages; put each into its message, as "
                    f"{{'type': '{name[:-1]}', '{name[:-1]}': …}}."
                )
        template = chat_template or self.chat_template
        for_template = {name: value for name, value in kwargs.items() if name not in KEYWORDS | TEMPLATE_KEYWORDS}
        check_template_arguments(template, tools=tools, documents=documents, **for_template)
        check_tool_calls(template, conversation)
        if sanitize_control_tokens and kwargs.get("tokenize"):
            conversation = mark_texts(conversation, self.tokenizer)
        if kwargs.get("tokenize"):  # no beginning token that the template has not written, as of tokenizers
            of_call = {name: kwargs.pop(name) for name in KEYWORDS.intersection(kwargs) - {"return_tensors"}}
            given = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **given, **of_call}
        with template_errors_in_a_sentence():
            return super().apply_chat_template(conversation, chat_template, tools=tools, documents=documents, **kwargs)

    def get_vocab(self) -> dict[str, int]:
        """The tokenizer's vocabulary: token to id."""
        return self.tokenizer.get_vocab()

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
