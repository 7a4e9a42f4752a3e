"""Our models with random weights, without a checkpoint: the linear one and the hybrid, in bf16, 8 and 4 bits."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmmamba.benchmarks.arguments import SIZES
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.quantize import quantize_folder
from mmmamba.conversion.shards import ShardWriter
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import FORMAT_VERSION, quantize_weight


ROOT = Path(__file__).resolve().parents[2]  # whose config.json is the released model's
# Mean and deviation by the end of a tensor's name; all others are matrices.
VALUES = {"norm.weight": (1.0, 0.0), "A_log": (0.0, 0.3), "dt_bias": (-4.0, 1.0), "conv1d.weight": (0.5, 0.3)}
MATRIX = (0.0, 0.02)


def model_config(model: str, size: str) -> MmMambaConfig:
    """The released config, with fewer and narrower layers if the size says so, and all of them Mamba-2 if `linear`."""
    config = MmMambaConfig.from_pretrained(ROOT)
    text = config.text_config
    if size != "released":
        layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[size]
        text.num_hidden_layers, text.num_embedding_layers = layers, layers // 4
        text.layer_types = text.layer_types[:layers]
        text.hidden_size, text.intermediate_size, text.head_dim = hidden, mlp, hidden // heads
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = heads, kv_heads, vocabulary
        text.bos_token_id, text.eos_token_id, config.image_token_id = 1, 2, 3
    if model == "linear":
        text.layer_types = ["linear_attention"] * text.num_hidden_layers
    return config


def make(folder: Path, model: str, size: str, bits: int) -> Path:
    """A model's folder in `folder`; made now if it is not there, or was quantised in another way."""
    full = folder / f"{model}-16"
    if not full.is_dir():
        print(f"{full.name} is made.", flush=True)
        write_bf16(full, model, size)
    if bits == 16:
        return full
    destination = folder / f"{model}-{bits}-{quantization_digest(bits)}"
    if not destination.is_dir():
        for outdated in folder.glob(f"{model}-{bits}-*"):
            shutil.rmtree(outdated)
        print(f"{destination.name} is made.", flush=True)
        quantize_folder(full, destination, bits)
    return destination


def quantization_digest(bits: int) -> str:
    """Changes when weights are quantised, or stored, in another way."""
    weight = torch.arange(1024.0).view(32, 32) / 1000 - 0.5
    stored = quantize_weight(weight, bits).numpy().tobytes()
    return hashlib.sha256(stored + bytes([FORMAT_VERSION])).hexdigest()[:8]


def bytes_to_make(folder: Path, candidates: list[tuple[str, int]], size: str) -> int:
    """Bytes of the weights that `make` would write for (model, bits)."""
    needed = 0
    for model in dict.fromkeys(model for model, _ in candidates):
        untouched = quantized = 0
        for name, spec in tensor_specs(model, size).items():
            if spec.dim() == 2 and not any(part in name for part in ("embed_tokens", "vision")):
                quantized += spec.numel()
            else:
                untouched += spec.numel()
        for bits in sorted({16} | {bits for name, bits in candidates if name == model}):
            if not any(folder.glob(f"{model}-{bits}-*" if bits < 16 else f"{model}-16")):
                needed += 2 * untouched + int(quantized * {16: 2, 8: 34 / 32, 4: 18 / 32}[bits])
    return needed


@cache
def code_digest() -> str:
    """Changes when the code of a loaded model does, or how it is loaded and timed."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("*_mmmamba.py"), ROOT / "cli/load.py", ROOT / "benchmarks/laptop/ours.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def tensor_specs(model: str, size: str) -> dict[str, Tensor]:
    """A model's tensors by name, on the meta device."""
    with torch.device("meta"):
        made = MmMambaForConditionalGeneration._from_config(model_config(model, size), dtype=torch.bfloat16)
    return made.state_dict()


def write_bf16(folder: Path, model: str, size: str) -> None:
    """Writes a model folder tensor by tensor; it is there whole, or not at all.

    Args:
        folder: To make.
        model: `linear` or `hybrid`.
        size: Of `SIZES`.
    """
    specs = tensor_specs(model, size)
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model_config(model, size).save_pretrained(temporary)
        random = torch.Generator().manual_seed(0)
        with ShardWriter(temporary, specs, "2GB") as writer:
            for name, spec in specs.items():
                writer.write(name, _random(name, spec, random))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _random(name: str, spec: Tensor, random: torch.Generator) -> Tensor:
    mean, deviation = next((values for end, values in VALUES.items() if name.endswith(end)), MATRIX)
    tensor = torch.empty_like(spec, device="cpu")
    return tensor.normal_(mean, deviation, generator=random) if deviation else tensor.fill_(mean)


def weight_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of a folder's tensors: of all, and of those that a step reads, one row of the embeddings among them."""
    total = read = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:  # a header is JSON behind its length
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            total += stop - start
            if "embed_tokens" in name:
                read += (stop - start) // tensor["shape"][0]
            elif "vision" not in name:
                read += stop - start
    return total, read
