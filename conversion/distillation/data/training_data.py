"""All the data that a run reads: what each stage trains on, and what a placement is measured on."""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmmamba import tokenization_mmmamba
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.recipe import Recipe
from mmmamba.conversion.shards import read_json
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor

from .collate import pack, pad
from .curriculum import LengthCurriculum
from .dataset import ConversationDataset
from .sources import check_entry, open_data
from .tiles import TileNormalizer


class TrainingData:
    """A recipe's conversations and documents: a user's own, or the picture world's in `examples/shapes`.

    Args:
        recipe: Says which, and how they become batches.
        teacher: Model folder; its tokenizer, chat template and image processor, if it has one, encode them.

    Attributes:
        collate: From a list of rows to a batch, whose tiles are levels of pixels.
        normalize: From these, (tiles, 3, size, size) uint8, to what models read, fp32; None without image processor.
        tokenizer, pad_token_id: The teacher's.

    Raises:
        ValueError: if the teacher has no tokenizer, or the recipe's data do not go together.
    """

    def __init__(self, recipe: Recipe, teacher: Path):
        self.recipe = recipe
        self.processor = load_processor(teacher)
        image_processor = getattr(self.processor, "image_processor", None)
        self.normalize = None if image_processor is None else TileNormalizer(image_processor)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        # It fills rows where nothing is read, so that any will do for a tokenizer that has none.
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad_token_id = next(token for token in tokens if token is not None)
        self.collate = partial(pack if recipe.packing else pad, pad_token_id=self.pad_token_id)
        own = [data for data in (recipe.data, recipe.stage_data(4)) if not _is_shapes(data)]
        for entry in (entry for data in [*own, recipe.held_out or ()] for entry in data):
            check_entry(entry)
        if recipe.strategy == "measured" and recipe.held_out is None and not _is_shapes(recipe.data):
            raise ValueError("strategy='measured' needs held_out in the recipe: data that no stage trains on.")

    def check(self) -> None:
        """Opens all data once: what is wrong with them should not be found out after hours of training.

        Raises:
            ValueError, FileNotFoundError, ImportError: see `open_data`.
        """
        if self.recipe.strategy == "measured" and not _is_shapes(self.recipe.data):
            self._open_held_out()
        for stage in (1, 4) if self.recipe.stage_data(4) != self.recipe.data else (1,):
            if not _is_shapes(self.recipe.stage_data(stage)):
                self.for_stage(stage)

    def for_stage(self, stage: int) -> Dataset:
        """Rows to train on; each stage has another order, or other images. See `open_data` for errors."""
        recipe, seed = self.recipe, self.recipe.seed * 10 + stage
        data = recipe.stage_data(stage)
        if _is_shapes(data):
            return self._shapes(data, "train", 1 + seed, recipe.stage(stage).batch_size)
        dataset, row_tokens = self._open(data, stage, seed), getattr(recipe.stage(stage), "row_tokens", None)
        if isinstance(row_tokens, list) and isinstance(dataset, ConversationDataset):
            return LengthCurriculum(dataset, row_tokens)
        return dataset

    def held_out(self, num_batches: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of rows that no stage trains on (and, in the picture world, that no score counts)."""
        if _is_shapes(self.recipe.data):
            dataset = self._shapes(self.recipe.data, "test", 10**6, self.recipe.stage(3).batch_size)
        else:
            dataset = self._open_held_out()
        if isinstance(dataset, IterableDataset):
            rows = iter(dataset)
        else:
            rows = (dataset[i % len(dataset)] for i in count())
        for _ in range(num_batches):
            batch = self.collate(list(islice(rows, batch_size)))
            if "pixel_values" in batch:
                batch["pixel_values"] = self.normalize(batch["pixel_values"])
            yield {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _open_held_out(self) -> Dataset:
        return self._open(self.recipe.held_out, 3, 0)

    def _open(self, data: list, stage: int, seed: int) -> Dataset:
        row_tokens = getattr(self.recipe.stage(stage), "row_tokens", None) or self.recipe.row_tokens
        longest = row_tokens[-1] if isinstance(row_tokens, list) else row_tokens
        return open_data(data, self.processor, self.recipe.max_tokens, longest, seed)

    def _shapes(self, data: list, split: str, seed: int, batch_size: int) -> Dataset:
        from mmmamba.examples.shapes.data import Conversations
        from mmmamba.examples.shapes.recall import RecallConversations

        if data == [{"shapes": "recall"}]:
            return RecallConversations(self.processor, seed, batch_size)
        return Conversations(self.processor, split, seed, batch_size)


def _is_shapes(data: list) -> bool:
    """Whether data are the picture world's. Raises ValueError if they are more than that."""
    if not any("shapes" in entry for entry in data if isinstance(entry, dict)):
        return False
    if data not in ([{"shapes": "train"}], [{"shapes": "recall"}]):
        raise ValueError(f"data={data} is more than the picture world; give `- shapes: train` alone (or `recall`).")
    return True


def load_processor(folder: Path) -> MmMambaProcessor | PreTrainedTokenizerBase:
    """Tokenizer, image processor and chat template of a model folder; the tokenizer alone if it reads text only.

    Raises:
        ValueError: if the folder has no tokenizer.
    """
    config = MmMambaConfig.from_pretrained(folder)
    tokenizer = _load_any_tokenizer(folder, config)
    if not (folder / "preprocessor_config.json").is_file():
        return tokenizer
    image_processor = MmMambaImageProcessorPil.from_pretrained(folder)
    return MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=config.tokens_per_tile)


def _load_any_tokenizer(folder: Path, config: MmMambaConfig) -> PreTrainedTokenizerBase:
    """Of the class that the folder names: this package's, or one of Transformers'."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} has no tokenizer; put the model's tokenizer files into it.")
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if name in tokenization_mmmamba.__all__:
        return tokenization_mmmamba.load_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, config=config)
