"""Answers and size of a picture world model under each quantisation tool, in memory and after loading again.

mmmamba bench quantization --model examples/shapes/hybrid

Needs `pip install -e ".[quantization]"` and leaves out what is not installed. `docs/quantization.md` has results.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mmmamba.cli.load import without_packing
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.data import pad
from mmmamba.examples.shapes.data import Conversations
from mmmamba.examples.shapes.evaluate import answers, check_is_shapes_model
from mmmamba.examples.shapes.folder import make_processor
from mmmamba.examples.shapes.world import example
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import MmMambaQuantizationConfig

from .timing import format_table, write_result


HYBRID = Path(__file__).parents[1] / "examples" / "shapes" / "hybrid"
COLUMNS = ["tool", "exact", "reloaded", "KL", "MB, fp32", "MB, bf16", "seconds", "cannot"]
KL_ROWS = 100  # held-out conversations whose answers' logits are compared, five at once
DTYPES = {"MB, fp32": torch.float32, "MB, bf16": torch.bfloat16}


def load(folder: Path, device: torch.device, **options) -> MmMambaForConditionalGeneration:
    """A model on one device, as it was saved where `options` do not say otherwise."""
    model = MmMambaForConditionalGeneration.from_pretrained(folder, device_map={"": str(device)}, **options).eval()
    return without_packing(model) if device.type == "cpu" else model


def save_with_quanto(model: MmMambaForConditionalGeneration, folder: Path) -> None:
    """Saves a model as quanto itself can; Transformers' `save_pretrained` refuses to."""
    from optimum.quanto import quantization_map

    model.config.save_pretrained(folder)
    (folder / "quanto.json").write_text(json.dumps(quantization_map(model)), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")


def load_with_quanto(folder: Path, device: torch.device) -> MmMambaForConditionalGeneration:
    """Loads what `save_with_quanto` wrote."""
    from optimum.quanto import requantize

    config = MmMambaConfig.from_pretrained(folder)
    del config.quantization_config  # Transformers would ask for weights that it quantises itself
    model = MmMambaForConditionalGeneration(config).eval()
    layers = json.loads((folder / "quanto.json").read_text(encoding="utf-8"))
    requantize(model, load_file(folder / "model.safetensors"), layers, device=device)
    return model


class Tool(NamedTuple):
    """A way to quantise.

    Args:
        package: What must be installed.
        config: Makes what `from_pretrained` is given as `quantization_config`.
        save: Writes a model to a folder.
        load: Loads that folder onto a device.
    """

    package: str
    config: Callable[[], object]
    save: Callable = MmMambaForConditionalGeneration.save_pretrained
    load: Callable = load


def _torchao(name: str, **options) -> TorchAoConfig:
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)(**options))


def _torchao_int4_on_any_device() -> TorchAoConfig:
    from torchao.quantization.granularity import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


TOOLS = {
    "none": Tool("torch", lambda: None),
    "mmmamba, 8 bits": Tool("torch", lambda: MmMambaQuantizationConfig(bits=8)),
    "mmmamba, 4 bits": Tool("torch", lambda: MmMambaQuantizationConfig(bits=4)),
    "bitsandbytes int8": Tool("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": Tool("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes nf4, double": Tool(
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes fp4": Tool("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "torchao int8": Tool("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao int4": Tool("torchao", lambda: _torchao("Int4WeightOnlyConfig", group_size=32)),
    "torchao intx, 4 bits": Tool("torchao", _torchao_int4_on_any_device),
    "quanto int8": Tool("optimum-quanto", lambda: QuantoConfig(weights="int8"), save_with_quanto, load_with_quanto),
}


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Runs `mmmamba bench quantization`. Raises ValueError for a folder that is not a model of the picture world."""
    check_is_shapes_model(args.model)
    batches = answers_to_predict()
    expected = predictions(load(args.model, device, dtype=torch.float32), batches)
    rows, packages = [], {}
    for name in args.tools:
        try:
            packages[TOOLS[name].package] = version(TOOLS[name].package)
        except PackageNotFoundError:
            print(f"{name} is left out: {TOOLS[name].package} is not installed.")
            continue
        rows.append({"tool": name} | measure(args.model, TOOLS[name], args.questions, device, batches, expected))
        settings = {"model": args.model.name, "questions": args.questions, "packages": packages}
        write_result("quantization", device, {"settings": settings, "rows": rows}, args.results)
    print(format_table(rows, COLUMNS))


def answers_to_predict() -> list[dict[str, Tensor]]:
    """Batches of held-out conversations; labels are -100 but on the answers."""
    processor = make_processor()
    conversations = Conversations(processor, "test")
    rows = [conversations.row(index) for index in range(KL_ROWS)]
    return [pad(rows[i : i + 5], processor.tokenizer.pad_token_id) for i in range(0, len(rows), 5)]


@torch.no_grad()
def predictions(model: MmMambaForConditionalGeneration, batches: list[dict[str, Tensor]]) -> Tensor:
    """Log-probabilities of every token of every answer, (tokens, vocabulary) in fp32, the right answer read so far."""
    found = []
    for batch in batches:
        inputs = {name: x.to(model.device) for name, x in batch.items() if name != "labels"}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs, use_cache=False).logits[:, :-1].cpu()
        found.append(logits[batch["labels"][:, 1:] != -100])
    return torch.cat(found).float().log_softmax(-1)


def measure(
    folder: Path,
    tool: Tool,
    num_questions: int,
    device: torch.device,
    batches: list[dict[str, Tensor]],
    expected: Tensor,
) -> dict[str, object]:
    """What a tool does to a model.

    Args:
        folder: Model folder of the picture world.
        tool: The tool.
        num_questions: Questions to answer.
        device: Where the model runs.
        batches: See `answers_to_predict`.
        expected: `predictions` of the unquantised model in fp32.

    Returns:
        `exact` and `reloaded`, percent of answers that are right in memory and after saving and loading; `KL` from
        the unquantised model's predictions, nats per token of the right answers; sizes; and what the tool refused.
    """
    examples = [example("test", 0, index) for index in range(num_questions)]
    # bitsandbytes multiplies in fp16 or bf16 on a GPU whatever the dtype, and bf16 is slow on many CPUs.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def percent_right(model) -> float:
        replies = answers(model, examples)
        return 100 * sum(reply == one.answer for reply, one in zip(replies, examples, strict=True)) / len(examples)

    row, step = {}, "load"
    try:
        model = load(folder, device, dtype=dtype, quantization_config=tool.config())
        step, start = "answer", time.perf_counter()
        row["exact"] = percent_right(model)
        row["seconds"] = time.perf_counter() - start
        found = predictions(model, batches)
        row["KL"] = F.kl_div(found, expected, reduction="batchmean", log_target=True).item()
        step = "save"
        with tempfile.TemporaryDirectory() as temporary:
            for column, stored in DTYPES.items():
                same = load(folder, device, dtype=stored, quantization_config=tool.config())
                saved = Path(temporary) / str(stored)
                tool.save(same, saved)
                row[column] = sum(file.stat().st_size for file in saved.glob("*.safetensors")) / 1e6
                row[f"embeddings and head, {column}"] = bytes_of_embeddings(saved) / 1e6
            saved = Path(temporary) / "after answering"
            tool.save(model, saved)
            step = "load again"
            row["reloaded"] = percent_right(tool.load(saved, device))
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        row["cannot"] = f"{step}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def bytes_of_embeddings(folder: Path) -> int:
    """Bytes of the token embeddings and the output head in a saved model, which no tool quantises by default."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found = {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors.keys())
            total += sum(tensors.get_tensor(name).nbytes for name in found)
    return total
