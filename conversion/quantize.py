"""A model folder whose linear layers take 4 or 8 bits, from one in floating point, a tensor at a time."""

import copy
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import (
    Provenance,
    check_model_folder,
    check_unquantized,
    check_weights,
    license_of,
    whole_folder,
    write_model_folder,
)
from mmmamba.conversion.shards import ShardReader, ShardWriter, is_finite
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import (
    MmMambaQuantizationConfig,
    quantize_weight,
)


EMBEDDING = "model.embed_tokens.weight"


class Report(NamedTuple):
    """What was quantised.

    Attributes:
        layers: How many linear layers.
        bytes_before, bytes_after: Of all weights, in the source and in the new folder.
    """

    layers: int
    bytes_before: int
    bytes_after: int


def quantize_folder(
    source: str | Path,
    destination: str | Path,
    bits: int,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> Report:
    """Makes a model folder with the decoder's linear layers and the head in 4 or 8 bits.

    Everything else keeps its dtype: embeddings, norms, the patch embedding, convolutions and the small parameters of
    Mamba-2 layers, and layers whose inputs are no multiple of 32. A tied head becomes a quantised copy of the
    embedding. Memory holds one tensor at a time. The destination appears complete, or not at all.

    Args:
        source: A model folder of this package.
        destination: Folder to make; must not exist.
        bits: 4 or 8.
        max_shard_size: Largest size of a weights file.
        progress: Whether to draw a progress bar.

    Raises:
        ValueError: if the source is no model folder of this package, is quantised already, has no layer that can be,
            or is damaged.
        FileExistsError: if the destination exists.
    """
    source, destination = Path(source), Path(destination)
    quantization = MmMambaQuantizationConfig(bits)
    check_model_folder(source)
    check_unquantized(source)
    with whole_folder(destination) as folder:
        config = MmMambaConfig.from_pretrained(source)
        reader = ShardReader(source)
        check_weights(reader, config)
        config, planned = _plan(config, quantization, reader)
        with (
            tqdm(total=len(planned), desc="Quantising", unit=" tensors", disable=not progress) as progress_bar,
            ShardWriter(folder, planned, max_shard_size) as writer,
        ):
            for name, spec in planned.items():
                tensor = reader[name if name in reader else EMBEDDING]  # of a tied head
                writer.write(name, _written(name, tensor, bits if spec.dtype == torch.uint8 else None))
                progress_bar.update()
        layers = sum(spec.dtype == torch.uint8 for spec in planned.values())
        before, after = (sum(x.nbytes for x in specs.values()) for specs in (reader.specs, planned))
        names = [os.path.basename(os.path.abspath(path)) for path in (source, destination)]  # of ".", too
        provenance = Provenance(
            base_model_relation=None,
            origin=f"Quantised from {names[0]}: linear layers take {bits} bits.",
            license=license_of(source),
            training=_description(bits, layers, before, after),
            command=f"mmmamba quantize {shlex.join(names)} --bits {bits}",
        )
        write_model_folder(folder, config, name=names[1], companions=source, provenance=provenance)
    return Report(layers, before, after)


def _plan(
    config: MmMambaConfig, quantization: MmMambaQuantizationConfig, reader: ShardReader
) -> tuple[MmMambaConfig, dict[str, Tensor]]:
    """The new model's configuration, and shapes and dtypes of its tensors, those that are quantised as uint8."""
    with torch.device("meta"):
        model = MmMambaForConditionalGeneration(copy.deepcopy(config))
    model.prepare_quantized_weights(quantization)
    planned = {
        name: spec if spec.dtype == torch.uint8 else reader.specs[name]
        for name, spec in model.state_dict().items()
        if spec.dtype == torch.uint8 or name in reader
    }
    model.config.quantization_config = quantization
    return model.config, planned


def _written(name: str, tensor: Tensor, bits: int | None) -> Tensor:
    """A tensor as it is stored, quantised if there are bits. Raises ValueError if it holds what no model has."""
    if bits is None:
        if not is_finite(tensor):
            raise ValueError(f"NaN or infinite values in {name}; the model is damaged.")
        return tensor
    try:
        return quantize_weight(tensor, bits)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _description(bits: int, layers: int, before: int, after: int) -> str:
    return (
        f"{layers} linear layers, those of the decoder and its output head, were rounded to {bits} bits in groups of "
        f"32 inputs with one fp16 scale each. Embeddings, norms, convolutions and all other parameters keep "
        f"their dtype. The weights take {after / 1e9:.3g} GB instead of {before / 1e9:.3g} GB"
    )
