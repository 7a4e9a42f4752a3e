"""All the conversations that a run reads: what each stage trains on, and what a placement is measured on."""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.recipe import Recipe
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTokenizer

from .collate import pack, pad
from .sources import check_entry, open_data
from .tiles import TileNormalizer


class TrainingData:
    """A recipe's conversations: a user's own, or those of the picture world in `examples/shapes`.

    Args:
        recipe: Says which, and how they become batches.
        teacher: Model folder; its tokenizer, chat template and image processor encode them.

    Attributes:
        collate: From a list of rows to a batch, whose tiles are levels of pixels.
        normalize: From these, (tiles, 3, size, size) uint8, to what models read, fp32.

    Raises:
        ValueError: if the teacher has no tokenizer, or the recipe's data do not go together.
    """

    def __init__(self, recipe: Recipe, teacher: Path):
        self.recipe = recipe
        self.processor = load_processor(teacher)
        self.normalize = TileNormalizer(self.processor.image_processor)
        self.collate = partial(pack if recipe.packing else pad, pad_token_id=self.processor.tokenizer.pad_token_id)
        self.uses_shapes = any("shapes" in entry for entry in recipe.data if isinstance(entry, dict))
        if self.uses_shapes and recipe.data not in ([{"shapes": "train"}], [{"shapes": "recall"}]):
            raise ValueError(
                f"data={recipe.data} is more than the picture world; give `- shapes: train` alone (or `recall`)."
            )
        for entry in [*(() if self.uses_shapes else recipe.data), *(recipe.held_out or ())]:
            check_entry(entry)
        if recipe.strategy == "measured" and recipe.held_out is None and not self.uses_shapes:
            raise ValueError("strategy='measured' needs held_out in the recipe: data that no stage trains on.")

    def check(self) -> None:
        """Opens all data once: what is wrong with them should not be found out after hours of training.

        Raises:
            ValueError, FileNotFoundError, ImportError: see `open_data`.
        """
        if not self.uses_shapes:
            if self.recipe.strategy == "measured":
                self._open_held_out()
            self.for_stage(1)

    def for_stage(self, stage: int) -> Dataset:
        """Rows to train on; each stage has another order, or other images. See `open_data` for errors."""
        recipe, seed = self.recipe, self.recipe.seed * 10 + stage
        if self.uses_shapes:
            return self._shapes("train", 1 + seed, recipe.stage(stage).batch_size)
        return open_data(recipe.data, self.processor, max_tokens=recipe.max_tokens, seed=seed)

    def held_out(self, num_batches: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of conversations that no stage trains on (and, in the picture world, that no score counts)."""
        if self.uses_shapes:
            dataset = self._shapes("test", 10**6, self.recipe.stage(3).batch_size)
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
        return open_data(self.recipe.held_out, self.processor, max_tokens=self.recipe.max_tokens, seed=0)

    def _shapes(self, split: str, seed: int, batch_size: int) -> Dataset:
        from mmmamba.examples.shapes.data import Conversations
        from mmmamba.examples.shapes.recall import RecallConversations

        if self.recipe.data == [{"shapes": "recall"}]:
            return RecallConversations(self.processor, seed, batch_size)
        return Conversations(self.processor, split, seed, batch_size)


def load_processor(folder: Path) -> MmMambaProcessor:
    """Tokenizer, image processor and chat template of a model folder.

    Raises:
        ValueError: if the folder has no tokenizer.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} has no tokenizer; put the model's tokenizer files into it.")
    config = MmMambaConfig.from_pretrained(folder)
    tokenizer = MmMambaTokenizer.from_pretrained(folder)
    image_processor = MmMambaImageProcessorPil.from_pretrained(folder)
    return MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=config.vision_config.tokens_per_tile)
