"""Pictures and videos in vLLM: the processors of the package make the tiles, vLLM puts tokens in their places.

A prompt comes as the chat template writes it, with `<img><IMG_CONTEXT></img>` for a picture and `<img></img>` for a
video. It becomes what `MmMambaProcessor` makes of it, token by token.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from mmmamba.chat_template_mmmamba import as_text
from mmmamba.processing_mmmamba import image_tokens, video_tokens


IMAGE = ["<img>", "<IMG_CONTEXT>", "</img>"]
VIDEO = ["<img>", "</img>"]
FIRST_LABEL = "Frame1: "
# What a request may say of its pictures (`mm_processor_kwargs`); other sizes would give other numbers of rows.
TILE_OPTIONS = ("min_patches", "max_patches", "use_thumbnail")


class MmMambaProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about pictures and videos before there are any."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {} if self.get_hf_config().vision_config is None else {"image": None, "video": None}

    def largest_picture(self) -> ImageSize:
        """A picture that is cut into the most tiles."""
        image_processor = self.get_hf_processor().image_processor
        tile = image_processor.size["height"]
        return ImageSize(width=tile * image_processor.max_patches, height=tile)

    def longest_video(self, seq_len: int, videos: int) -> int:
        """How many frames of one tile fit into so many tokens, for each video."""
        frame = self.get_hf_processor().tokens_per_tile + 8  # "Frame123: <img>…</img>\\n"
        return max(1, min(32, seq_len // frame // max(1, videos)))


class MmMambaDummyInputs(BaseDummyInputsBuilder[MmMambaProcessingInfo]):
    """The largest inputs that can come, by which vLLM measures how much memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(IMAGE) * mm_counts.get("image", 0) + "".join(VIDEO) * mm_counts.get("video", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> MultiModalDataDict:
        picture, videos = self.info.largest_picture(), mm_counts.get("video", 0)
        tile = picture.height
        return {
            "image": self._get_dummy_images(
                width=picture.width,
                height=picture.height,
                num_images=mm_counts.get("image", 0),
                overrides=mm_options.get("image"),
            ),
            "video": self._get_dummy_videos(
                width=tile,
                height=tile,
                num_frames=self.info.longest_video(seq_len, videos),
                num_videos=videos,
                overrides=mm_options.get("video"),
            ),
        }


class MmMambaMultiModalProcessor(BaseMultiModalProcessor[MmMambaProcessingInfo]):
    """Tiles of pictures and videos, and the tokens that stand for them."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor, output = self.info.get_hf_processor(), BatchFeature()
        check_tile_options(hf_kwargs, most=processor.image_processor.max_patches)
        if (pictures := hf_data.get("images")) is not None:
            output.update(self.info.ctx.call_hf_processor(processor.image_processor, {"images": pictures}, hf_kwargs))
        if (videos := hf_data.get("videos")) is not None:
            of_videos = self.info.ctx.call_hf_processor(processor.video_processor, {"videos": videos}, hf_kwargs)
            frames = of_videos["num_patches"].split(of_videos["num_frames"].tolist())
            output["pixel_values_videos"] = of_videos["pixel_values"]
            output["num_patches_videos"] = torch.stack([tiles.sum() for tiles in frames])
            output["num_patches_frames"], output["num_frames"] = of_videos["num_patches"], of_videos["num_frames"]
        return output

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Writes the first frame's label before a video, since it is encoded together with the text before it."""
        tokenizer, labelled, text = self.info.get_tokenizer(), [], 0
        start, end = tokenizer.convert_tokens_to_ids(VIDEO)
        special = set(tokenizer.get_added_vocab().values())
        for index, token in enumerate(prompt):
            if token == start and prompt[index + 1 : index + 2] == [end]:
                said = tokenizer.decode(labelled[text:], clean_up_tokenization_spaces=False)
                labelled[text:] = tokenizer.encode(as_text(said, tokenizer) + FIRST_LABEL, add_special_tokens=False)
            labelled.append(token)
            if token in special:
                text = len(labelled)
        return labelled

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        of_pictures, of_videos, frames = (
            hf_inputs.get(name, torch.empty(0, dtype=torch.long))
            for name in ("num_patches", "num_patches_videos", "num_frames")
        )
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", of_pictures),
            "num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", of_videos),
            "num_patches_videos": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "num_patches_frames": MultiModalFieldConfig.flat_from_sizes("video", frames, keep_on_cpu=True),
            "num_frames": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        tokenizer, rows = self.info.get_tokenizer(), self.info.get_hf_processor().tokens_per_tile
        place = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")

        def tokens(text: str) -> PromptUpdateDetails:
            return PromptUpdateDetails.select_token_id(tokenizer.encode(text, add_special_tokens=False), place)

        def picture(index: int) -> PromptUpdateDetails:
            return tokens(image_tokens(int(out_mm_kwargs["image"][index]["num_patches"].data) * rows))

        def video(index: int) -> PromptUpdateDetails:
            tiles = out_mm_kwargs["video"][index]["num_patches_frames"].data.tolist()
            return tokens(video_tokens(tiles, rows).removeprefix(FIRST_LABEL))

        return [
            PromptReplacement("image", tokenizer.convert_tokens_to_ids(IMAGE), picture),
            PromptReplacement("video", tokenizer.convert_tokens_to_ids(VIDEO), video),
        ]


def check_tile_options(options: Mapping[str, object], most: int) -> None:
    """Raises ValueError for what a request may not say of its pictures.

    Args:
        options: Keywords for the image and video processors.
        most: Tiles of a picture, thumbnail not counted, that the folder allows.
    """
    for name, value in options.items():
        if name not in TILE_OPTIONS:
            raise ValueError(
                f"mm_processor_kwargs has {name!r}, which a request may not change; give {', '.join(TILE_OPTIONS)}."
            )
        if name != "use_thumbnail" and (
            isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most
        ):
            raise ValueError(f"mm_processor_kwargs has {name}={value!r:.60}; give a whole number from 1 to {most}.")
