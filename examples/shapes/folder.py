"""Model folders of the picture world: its tokenizer, tiles of 48 pixels, and the weights in bf16."""

from pathlib import Path

import torch

from mmmamba.conversion.package_code import PACKAGE, import_from_package
from mmmamba.conversion.publish import whole_folder, write_model_folder
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast

from .tokenizer import MODEL_FILE, SYSTEM_MESSAGE
from .world import MAX_TILES, TILE


SHIPPED = Path(__file__).resolve().parent  # models in this folder are part of the package
TOKENS_PER_TILE = 4


def make_processor() -> MmMambaProcessor:
    """The processor of all three models; its chat template has the system message that they were trained with."""
    template = (PACKAGE / "chat_template.jinja").read_text(encoding="utf-8")
    start = template.index("'<|im_start|>system\\n你") + len("'<|im_start|>system\\n")
    end = template.index("<|im_end|>", start)
    tokenizer = MmMambaTokenizerFast(str(MODEL_FILE))
    tokenizer.chat_template = template[:start] + SYSTEM_MESSAGE + template[end:]
    image_processor = MmMambaImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=MAX_TILES)
    return MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=TOKENS_PER_TILE)


def save(model: MmMambaForConditionalGeneration, folder: Path, name: str, origin: str) -> None:
    """Writes a complete model folder, or nothing.

    Args:
        model: Of the picture world.
        folder: Where to write.
        name: What the model is called.
        origin: A sentence on how it was made.

    Raises:
        FileExistsError: if the folder exists.
    """
    with whole_folder(folder) as unfinished:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        write_model_folder(unfinished, model.config, name, make_processor(), origin=origin)
        if folder.resolve().parent == SHIPPED:
            import_from_package(unfinished)
