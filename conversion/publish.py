"""Complete model folders, ready for the Hub: everything beside the weights, and folders that appear whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.shards import read_json, write_json
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


PACKAGE = Path(__file__).resolve().parent.parent
AUTO_MAP = {"AutoConfig": "configuration_mmmamba.MmMambaConfig"} | dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "modeling_mmmamba.MmMambaForConditionalGeneration",
)
IMAGE_PROCESSORS = {
    "torchvision": "image_processing_mmmamba.MmMambaImageProcessor",
    "pil": "image_processing_mmmamba.MmMambaImageProcessorPil",
}
# Where the conversation templates end a turn; the first that template and vocabulary have.
TURN_ENDS = ("<|im_end|>", "<|end|>", "[UNUSED_TOKEN_1]")
# Files of a model folder that depend on neither weights nor mixers.
COMPANIONS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CARD = """---
{metadata}
---

# {name}

A decoder-only multimodal language model: picture patches and text enter one causal decoder of {layers} layers
({mixers}). There is no separate vision encoder. Method: [Multimodal Mamba](https://arxiv.org/abs/2502.13145).
{origin}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{name}"  # this folder, or its name on the Hub
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()

content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs.to(model.device), max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```
"""


@contextmanager
def whole_folder(destination: str | Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and not at all otherwise.

    Yields:
        The folder to fill, a hidden sibling of the destination.

    Raises:
        FileExistsError: if the destination exists.
    """
    destination = Path(destination).absolute()
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; name a folder that does not, or remove this one.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f".{destination.name}.unfinished-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(destination)
    finally:
        # After the rename nothing of this name is left; on any failure, an interrupt included, it is removed.
        shutil.rmtree(folder, ignore_errors=True)


def check_model_folder(folder: str | Path) -> None:
    """Raises ValueError if a folder does not hold a model of this package."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json.")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != MmMambaConfig.model_type:
        raise ValueError(
            f"{folder} has model_type={model_type!r}, which is not this package's layout; run `mmmamba convert` on it "
            "first."
        )


def expected_specs(config: MmMambaConfig) -> dict[str, Tensor]:
    """Every stored tensor of a model, by name, on the meta device: shapes without memory."""
    with torch.device("meta"):
        specs = MmMambaForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del specs["lm_head.weight"]
    return specs


def model_card(name: str, config: MmMambaConfig, base_model: str | None = None, origin: str = "") -> str:
    """The README.md of a model folder.

    Args:
        name: What the model is called.
        config: Its configuration.
        base_model: Name on the Hub of the model it comes from.
        origin: A sentence on how it was made.
    """
    kinds = config.text_config.layer_types
    attention, mamba = kinds.count("full_attention"), kinds.count("linear_attention")
    metadata = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["mmmamba", "multimodal", "custom_code", *(["mamba2"] if mamba else [])],
        base_model=base_model,
    )
    mixers = " and ".join(
        f"{count} {kind}" for count, kind in ((mamba, "Mamba-2"), (attention, "softmax attention")) if count
    )
    return CARD.format(
        metadata=metadata.to_yaml().strip(),
        name=name,
        layers=len(kinds),
        mixers=mixers,
        origin=f"\n{origin}\n" if origin else "",
    )


def write_model_folder(
    folder: Path,
    config: MmMambaConfig,
    name: str,
    processor: ProcessorMixin | None = None,
    companions: Path | None = None,
    base_model: str | None = None,
    origin: str = "",
) -> None:
    """Writes everything of a model folder but the weights.

    Args:
        folder: An existing folder.
        config: The model's configuration; its `auto_map` and `architectures` are set.
        name: What the model is called, for its card.
        processor: Tokenizer, image processor and chat template to save, or an image processor alone.
        companions: A model folder of the same vocabulary to copy these files from instead.
        base_model: Name on the Hub of the model it comes from.
        origin: A sentence for the card on how it was made.
    """
    folder = Path(folder)
    config.architectures = [MmMambaForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    tokenizer = getattr(processor, "tokenizer", None)
    generation = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    if tokenizer is not None:
        _use_ids_of(tokenizer, config, generation)
    generation.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        # processor_config.json holds the image processor too, but tools that need that alone look for its own file.
        getattr(processor, "image_processor", processor).save_pretrained(folder)
        _offer_both_backends(folder)
    if companions is not None:
        for file in COMPANIONS:
            if (companions / file).is_file():
                shutil.copyfile(companions / file, folder / file)
    config.save_pretrained(folder)
    for module in sorted(PACKAGE.glob("*_mmmamba.py")):
        shutil.copyfile(module, folder / module.name)
    (folder / "README.md").write_text(model_card(name, config, base_model, origin), encoding="utf-8")


def _offer_both_backends(folder: Path) -> None:
    """Lets AutoImageProcessor choose by `backend`; saving names only the class that was saved."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            values = read_json(folder / file)
            values.get("image_processor", values)["auto_map"]["AutoImageProcessor"] = IMAGE_PROCESSORS
            write_json(folder / file, values)


def _use_ids_of(tokenizer: PreTrainedTokenizerBase, config: MmMambaConfig, generation: GenerationConfig) -> None:
    """Ends answers where the chat template ends a turn, and pads as the tokenizer does."""
    vocabulary, template = tokenizer.get_vocab(), tokenizer.chat_template or ""
    ends = [vocabulary[token] for token in TURN_ENDS if token in template and token in vocabulary]
    for target in (config.text_config, generation):
        target.pad_token_id = tokenizer.pad_token_id
        if ends:
            target.eos_token_id = ends[0]
