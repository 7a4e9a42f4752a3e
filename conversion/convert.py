"""Checkpoints of other layouts into this package's, one tensor at a time: what all layouts have in common."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.hovle import HOVLE, RELEASED, chat_template, open_upstream, read_upstream_config
from mmmamba.conversion.layouts import Checkpoint
from mmmamba.conversion.llama import VisionPlan, check_language_model, find_gguf, open_language_model
from mmmamba.conversion.publish import Provenance, expected_specs, whole_folder, write_model_folder
from mmmamba.conversion.shards import ShardWriter, is_finite, listed, read_json


__all__ = ["Report", "VisionPlan", "chat_template", "check_tensors", "convert", "read_upstream_config"]


class Report(NamedTuple):
    """What a conversion did.

    Attributes:
        config: The written model's configuration.
        tensors: Number of tensors written.
        left_out: Upstream tensor to the reason why it was not needed.
        notes: What the folder lacks and how to add it.
    """

    config: MmMambaConfig
    tensors: int
    left_out: dict[str, str]
    notes: list[str]


def check_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Accounts for every tensor of a checkpoint.

    Returns:
        Name to reason of the tensors that are left out.

    Raises:
        ValueError: listing the tensors that are missing, unknown or of the wrong shape.
    """
    found, ours = checkpoint.tensors.specs, expected_specs(checkpoint.config)
    expected = {}
    for rule in checkpoint.rules:
        shaped = rule.operation.write([ours[name] for name in rule.targets], checkpoint.config.text_config)
        expected |= {name: tuple(spec.shape) for name, spec in zip(rule.sources, shaped, strict=True)}
    missing = sorted(set(expected) - set(found))
    left_out = {name: checkpoint.reason_unused(name) for name in sorted(set(found) - set(expected))}
    unknown = [name for name, reason in left_out.items() if reason is None]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        advice = "check that config.json belongs to these weights and that the download is complete"
        if missing and any(".attention.g_proj." in name for name in found):
            advice = (
                "this is a training checkpoint, which holds only what was trained; merge it into its teacher's "
                "tensors first"
            )
        raise ValueError(f"The weights do not fit config.json ({'; '.join(problems)}); {advice}.")
    return left_out


def convert(
    source: str | Path,
    destination: str | Path,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
    vision: VisionPlan | None = None,
) -> Report:
    """Converts a checkpoint into a complete model folder of this package.

    Tensors keep their dtype. Memory holds one tensor at a time, but all of a GGUF file in fp32. The destination
    appears complete, or not at all.

    Args:
        source: Folder with config.json and safetensors, of HoVLE, the released mmMamba or a Llama-shaped language
            model; or a GGUF file of the latter. A tokenizer is taken along if it is there.
        destination: Folder to make; must not exist.
        max_shard_size: Largest size of a weights file.
        progress: Whether to draw a progress bar.
        vision: What a language model is to read pictures with; without it the model reads text only.

    Raises:
        ValueError: if the source is not understood, or tensors are missing, unknown, wrong-shaped, NaN or infinite.
        FileExistsError: if the destination exists.
    """
    destination = Path(destination)
    with whole_folder(destination) as folder:
        checkpoint = _open(Path(source), vision)
        config, reader, rules = checkpoint.config, checkpoint.tensors, checkpoint.rules
        left_out = check_tensors(checkpoint) | checkpoint.unused_rows
        if checkpoint.chat_template is not None:
            (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")

        planned = {}
        for rule in rules:
            parts = rule.operation.read([reader.specs[name] for name in rule.sources], config.text_config)
            planned |= zip(rule.targets, parts, strict=True)
        bytes_of = Counter()
        for spec in planned.values():
            bytes_of[spec.dtype] += spec.numel() * spec.element_size()
        config.dtype = bytes_of.most_common(1)[0][0]
        new = {name: tensor.to(config.dtype) for name, tensor in checkpoint.new.items()}
        planned |= new

        non_finite = []
        progress_bar = tqdm(total=len(planned), desc="Converting", unit=" tensors", disable=not progress)
        with progress_bar, ShardWriter(folder, planned, max_shard_size) as writer:
            for rule in rules:
                tensors = [reader[name] for name in rule.sources]
                non_finite += [name for name, x in zip(rule.sources, tensors, strict=True) if not is_finite(x)]
                parts = rule.operation.read(tensors, config.text_config)
                for name, part in zip(rule.targets, parts, strict=True):
                    writer.write(name, part)
                    progress_bar.update()
            for name, tensor in new.items():
                writer.write(name, tensor)
                progress_bar.update()
        if non_finite:
            raise ValueError(f"NaN or infinite values in {listed(non_finite)}; the checkpoint is damaged.")
        write_model_folder(
            folder,
            config,
            name=destination.name,
            processor=checkpoint.processor,
            provenance=Provenance(
                base_model=checkpoint.base_model,
                base_model_relation=None,
                origin=checkpoint.origin,
                license=checkpoint.license,
            ),
        )
    return Report(config, len(planned), left_out, checkpoint.notes)


def _open(source: Path, vision: VisionPlan | None) -> Checkpoint:
    gguf = find_gguf(source)
    if gguf is not None:
        return open_language_model(source, gguf, vision)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder of a downloaded checkpoint, or a GGUF file.")
    values = read_json(source / "config.json")
    kind = values.get("model_type")
    if kind in (HOVLE[0], RELEASED[0], MmMambaConfig.model_type):
        if vision is not None:
            raise ValueError(
                f"{source} has model_type={kind!r}; --vision is for language models in their original layout."
            )
        return open_upstream(source, values)
    check_language_model(kind)
    return open_language_model(source, None, vision)
