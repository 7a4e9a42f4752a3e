"""Complete model folders, ready for the Hub: everything beside the weights, and folders that appear at once."""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.package_code import PACKAGE, name_modules
from mmmamba.conversion.shards import ShardReader, listed, read_json, write_json, write_text
from mmmamba.modeling_mmmamba import AUTO_CLASSES, MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import quantization_of


AUTO_MAP = {"AutoConfig": "configuration_mmmamba.MmMambaConfig"} | dict.fromkeys(
    AUTO_CLASSES, "modeling_mmmamba.MmMambaForConditionalGeneration"
)
IMAGE_PROCESSORS = {
    "torchvision": "image_processing_mmmamba.MmMambaImageProcessor",
    "pil": "image_processing_mmmamba.MmMambaImageProcessorPil",
}
# The end-of-turn tokens of the conversation templates; the first one counts that template and vocabulary have.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|end|>", "[UNUSED_TOKEN_1]")
# Files of a model folder that depend on neither the weights nor the layer types.
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CARD = """---
{metadata}
---

# {name}

A decoder-only multimodal language model: image patches and text enter one causal decoder of {layers} layers
({mixers}).
There is no separate vision encoder. Method: [Multimodal Mamba](https://arxiv.org/abs/2502.13145).
{origin}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

path = {path}  # this folder, or its name on the Hub
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
{sections}"""
TEXT_CARD = """---
{metadata}
---

# {name}

A language model: one causal decoder of {layers} layers ({mixers}).
It reads text only. Method: [Multimodal Mamba](https://arxiv.org/abs/2502.13145).
{origin}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path}  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()

messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(tokenizer.batch_decode(answer, skip_special_tokens=True)[0])
```
{sections}"""
# The Hub's names of how a model comes from its base model.
RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from, for its card.

    Texts are plain: what would mean something to Markdown or YAML is escaped. Names that cannot be the Hub's, such as
    folders, stay out of the card's metadata, and the text has only their last part.

    Attributes:
        base_model: Name on the Hub of the model it comes from.
        base_model_relation: What it is to that model, one of `RELATIONS`. The Hub has none for a distilled model;
            `finetune` comes closest.
        origin: A sentence on how it was made.
        license: Of the weights, by the Hub's name; None if it is not known.
        datasets: Names on the Hub of what it was trained on, or whatever else `datasets` loads.
        files: What it was trained on besides: files, folders, or what generates it.
        results: What was measured.
        training: How it was trained, such as stages, steps and tokens.
        command: The command that reproduces it.

    Raises:
        ValueError: if the relation is none of the Hub's.
    """

    base_model: str | None = None
    base_model_relation: str | None = "finetune"
    origin: str = ""
    license: str | None = "mit"
    datasets: Sequence[str] = ()
    files: Sequence[str] = ()
    results: Sequence[EvalResult] = ()
    training: str | None = None
    command: str | None = None

    def __post_init__(self):
        if self.base_model_relation not in (None, *RELATIONS):
            raise ValueError(
                f"base_model_relation={self.base_model_relation!r} is not what the Hub knows; give one of "
                f"{', '.join(RELATIONS)}."
            )


@contextmanager
def whole_folder(destination: str | Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends without an error, and not at all otherwise.

    Only a killed process leaves its partial folder behind, `.NAME.unfinished-RANDOM` beside the destination. That
    hinders no later one and can be removed.

    Yields:
        The folder to fill, a hidden sibling of the destination.

    Raises:
        FileExistsError: if the destination exists.
    """
    destination = Path(destination).absolute()
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; name a folder that does not, or remove this one.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id, which is the same again in the next container.
    folder = destination.with_name(f".{destination.name}.unfinished-{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        yield folder
        try:
            folder.rename(destination)
        except OSError:
            if destination.exists():
                raise FileExistsError(f"{destination} was made by another process meanwhile; it stays.") from None
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # on any failure, an interrupt included; renamed, it is not there


def remove_partial_folders(parent: str | Path) -> None:
    """Removes what killed processes left of the folders that they were writing, here and in all subfolders.

    Safe only where no other process is writing.
    """
    for folder in Path(parent).rglob(".*.unfinished-*"):
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


def check_unquantized(folder: str | Path) -> None:
    """Raises ValueError if a model folder's weights are quantised, by this package or another."""
    found = read_json(Path(folder) / "config.json").get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ValueError(
            f"{folder} is quantised (quant_method={method!r}); give the folder that it was made from, with weights in "
            "floating point."
        )


def expected_specs(config: MmMambaConfig) -> dict[str, Tensor]:
    """Every stored tensor of a model, by name, on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = MmMambaForConditionalGeneration(config)
    if (quantization := quantization_of(config)) is not None:
        model.prepare_quantized_weights(quantization)
    specs = model.state_dict()
    if config.tie_word_embeddings:
        del specs["lm_head.weight"]
    return specs


def check_weights(reader: ShardReader, config: MmMambaConfig) -> None:
    """Raises ValueError unless a folder holds the tensors that its configuration asks for, and no others."""
    expected = expected_specs(config)
    found = reader.specs
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(spec.shape)}"
        for name, spec in expected.items()
        if name in found and found[name].shape != spec.shape
    ]
    differences = (
        ("missing", sorted(set(expected) - set(found))),
        ("unknown", sorted(set(found) - set(expected))),
        ("wrong shape", misshapen),
    )
    if problems := [f"{what}: {listed(names)}" for what, names in differences if names]:
        raise ValueError(
            f"The weights of {reader.folder} do not fit its config.json ({'; '.join(problems)}); check that they "
            "belong together."
        )


def model_card(
    name: str,
    config: MmMambaConfig,
    base_model: str | None = None,
    origin: str = "",
    provenance: Provenance | None = None,
) -> str:
    """The README.md of a model folder.

    Args:
        name: What the model is called.
        config: Its configuration.
        base_model: Name on the Hub of the model it comes from.
        origin: A sentence on how it was made.
        provenance: These two and more; replaces them.
    """
    source = provenance or Provenance(base_model=base_model, base_model_relation=None, origin=origin)
    kinds, text_only = config.text_config.layer_types, config.vision_config is None
    base = source.base_model if _is_hub_name(source.base_model) else None
    # `datasets` looks for a name in the working directory first.
    datasets = [name for name in source.datasets if _is_hub_name(name) and not Path(name).exists()]
    # YAML would write a NumPy or PyTorch scalar as an object.
    results = [
        replace(x, metric_value=getattr(x.metric_value, "item", lambda x=x: x.metric_value)()) for x in source.results
    ]
    tags = ["mmmamba", *(() if text_only else ("multimodal",)), "custom_code"]
    tags += ["mamba2"] if "linear_attention" in kinds else []
    metadata = ModelCardData(
        license=source.license,
        library_name="transformers",
        pipeline_tag="text-generation" if text_only else "image-text-to-text",
        tags=tags,
        base_model=base,
        base_model_relation=source.base_model_relation if base else None,
        datasets=datasets or None,
        eval_results=results or None,
        model_name=" ".join(name.split()) if results else None,
    )
    sections = [*_training_section(source, datasets), *_results_section(results)]
    return (TEXT_CARD if text_only else CARD).format(
        metadata=metadata.to_yaml().strip(),
        name=_escape(name),
        path=json.dumps(name, ensure_ascii=False),  # a string of JSON is one of Python, too
        layers=len(kinds),
        mixers=_describe_mixers(kinds),
        origin=f"\n{_escape(source.origin)}\n" if source.origin else "",
        sections="".join(f"\n{section}\n" for section in sections),
    )


def license_of(folder: str | Path) -> str | None:
    """The licence that a folder's card names, None if there is no card or it names none."""
    try:
        name = ModelCard((Path(folder) / "README.md").read_text(encoding="utf-8")).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return name if isinstance(name, str) else None


def _describe_mixers(kinds: list[str]) -> str:
    attention = [str(index) for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not attention:
        return "all of them Mamba-2, none attention"
    if len(attention) == len(kinds):
        return "all of them softmax attention"
    layers = f"layer{'s' if len(attention) > 1 else ''} {' and '.join(', '.join(attention).rsplit(', ', 1))}"
    return f"softmax attention in {layers} and Mamba-2 in the other {len(kinds) - len(attention)}, counted from 0"


def _training_section(source: Provenance, datasets: list[str]) -> list[str]:
    lines = []
    if _is_hub_name(source.base_model):
        lines.append(f"Base model: [{source.base_model}](https://huggingface.co/{source.base_model}).")
    elif source.base_model:
        lines.append(f"Base model: {_escape(Path(source.base_model).name)}.")
    if datasets:
        names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        lines.append(f"Trained on {names} from the Hub.")
    if local := [*(name for name in source.datasets if name not in datasets), *source.files]:
        names = ", ".join(_escape(Path(name).name or name) for name in local)
        lines.append(f"Trained on data that is not on the Hub: {names}.")
    if source.training:
        words = _escape(source.training).rstrip(".")
        lines.append(f"{words[:1].upper()}{words[1:]}.")
    if source.command:
        longest_run = max(map(len, re.findall("`+", source.command)), default=0)
        fence = "`" * max(3, longest_run + 1)
        lines.append(f"To do it again:\n\n{fence}bash\n{source.command.strip()}\n{fence}")
    return ["## How it was made", *lines] if lines else []


def _results_section(results: Sequence[EvalResult]) -> list[str]:
    rows = [
        (
            result.task_name or result.task_type,
            " ".join(filter(None, (result.dataset_name, result.dataset_config, result.dataset_split))),
            result.metric_name or result.metric_type,
            f"{result.metric_value:.6g}" if isinstance(result.metric_value, float) else str(result.metric_value),
        )
        for result in results
    ]
    if not rows:
        return []
    lines = ["| task | data | metric | value |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(_escape, row))} |" for row in rows]
    return ["## Results", "\n".join(lines)]


def _is_hub_name(name: str | None) -> bool:
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return True


def _escape(text: str) -> str:
    """One line of Markdown that shows this text as it is."""
    # An underscore within a word means nothing to Markdown, and escaping it would break addresses.
    text = re.sub(r"[\\`*\[\]<>#|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(text).split()))
    # A line must not begin like a list item.
    return re.sub(r"^(\d*)([-+.)])(?=\s)", r"\1\\\2", text)


def write_model_folder(
    folder: Path,
    config: MmMambaConfig,
    name: str,
    processor: ProcessorMixin | None = None,
    companions: Path | None = None,
    base_model: str | None = None,
    origin: str = "",
    provenance: Provenance | None = None,
) -> None:
    """Writes everything of a model folder but the weights. A README.md that exists is not overwritten.

    Args:
        folder: An existing folder.
        config: The model's configuration; its `auto_map` and `architectures` are set.
        name: What the model is called, for its card.
        processor: Tokenizer, image processor and chat template to save, or an image processor or a tokenizer alone.
        companions: A model folder of the same vocabulary to copy these files from instead.
        base_model: Name on the Hub of the model it comes from.
        origin: A sentence for the card on how it was made.
        provenance: These two and more for the card; replaces them.
    """
    write_model_files(folder, config, processor, companions)
    write_card(folder, model_card(name, config, base_model, origin, provenance))


def write_card(folder: str | Path, card: str) -> bool:
    """Writes a model folder's README.md if it has none. Returns whether it did."""
    file = Path(folder) / "README.md"
    if file.exists():
        return False
    write_text(file, card)
    return True


def write_model_files(
    folder: Path, config: MmMambaConfig, processor: ProcessorMixin | None = None, companions: Path | None = None
) -> None:
    """Writes everything of a model folder but weights and card; see `write_model_folder`."""
    folder = Path(folder)
    config.architectures = [MmMambaForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    tokenizer = processor if isinstance(processor, PreTrainedTokenizerBase) else getattr(processor, "tokenizer", None)
    generation = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    if tokenizer is not None:
        _set_token_ids(tokenizer, config, generation)
    generation.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        # processor_config.json holds the image processor, too, but AutoImageProcessor looks for a file of its own.
        getattr(processor, "image_processor", processor).save_pretrained(folder)
        _register_both_backends(folder)
    if companions is not None:
        for file in PROCESSOR_FILES:
            if (companions / file).is_file():
                shutil.copyfile(companions / file, folder / file)
            if file.endswith(".json") and (folder / file).is_file():
                # The teacher may import its code from the package; this folder holds its own.
                text = (folder / file).read_text(encoding="utf-8")
                (folder / file).write_text(name_modules(text), encoding="utf-8")
    config.save_pretrained(folder)
    for module in sorted(PACKAGE.glob("*_mmmamba.py")):
        shutil.copyfile(module, folder / module.name)


def _register_both_backends(folder: Path) -> None:
    """Lets AutoImageProcessor choose by `backend`. A saved Pillow processor names only itself, so that it is kept."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            values = read_json(folder / file)
            values.get("image_processor", values)["auto_map"]["AutoImageProcessor"] = IMAGE_PROCESSORS
            write_json(folder / file, values)


def _set_token_ids(tokenizer: PreTrainedTokenizerBase, config: MmMambaConfig, generation: GenerationConfig) -> None:
    """Ends answers where the chat template ends a turn, and pads as the tokenizer does."""
    vocabulary, template = tokenizer.get_vocab(), tokenizer.chat_template or ""
    ends = [vocabulary[token] for token in END_OF_TURN_TOKENS if token in template and token in vocabulary]
    for target in (config.text_config, generation):
        target.pad_token_id = tokenizer.pad_token_id
        if ends:
            others = target.eos_token_id if isinstance(target.eos_token_id, list) else []
            target.eos_token_id = [ends[0], *(x for x in others if x != ends[0])] if others else ends[0]
