"""Peak memory and time of the three distillation stages, beside naive implementations of the same losses.

mmmamba bench distillation                          # 32 layers
mmmamba bench distillation --layers 8 --length 512   # smaller

`naive` is what one writes first. In stages 1 and 2 it runs the teacher in full and keeps its attention inputs and
heads, runs the student in full with autograd over all its layers, each mixer reading the teacher's input, and does one
backward pass; in stage 3 it holds both models' logits of all positions. `mixers` (stages 1 and 2) runs nothing of the
student but the mixers, still with one backward pass over all of them. The losses are checked to be equal. Every
measurement runs in a process of its own, and the implementations take turns. Gradients and optimiser state, the same
for all, exist before measuring starts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.layerwise import LOSS_SCALE, LayerwiseDistiller, mamba_mixers
from mmmamba.conversion.seeding import seed_state_dict
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .memory import bench_in_subprocess, peak_memory, reset_peak_memory
from .timing import format_table, write_result


IMPLEMENTATIONS = {1: ("ours", "naive", "mixers"), 2: ("ours", "naive", "mixers"), 3: ("ours", "naive")}  # by stage
COLUMNS = ["stage", "way", "MiB", "seconds", "times ours' MiB", "times ours' seconds"]


def run(args: argparse.Namespace, device: torch.device) -> None:
    if args.measure_here:
        stage, implementation = args.measure_here
        print(json.dumps(measure(args, int(stage), implementation, device)))
        return
    settings = {name: getattr(args, name) for name in ("layers", "hidden", "vocabulary", "length", "steps")}
    command = ["distillation", f"--device={args.device}", f"--threads={torch.get_num_threads()}"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    rows = []
    for stage, implementations in IMPLEMENTATIONS.items():
        results = {name: [] for name in implementations}
        for turn in range(args.rounds):
            for name in implementations if turn % 2 == 0 else reversed(implementations):
                results[name].append(bench_in_subprocess([*command, "--measure-here", str(stage), name]))
        losses = [runs[0]["loss"] for runs in results.values()]
        if max(losses) - min(losses) > 1e-3 * abs(losses[0]):
            raise RuntimeError(f"stage {stage}: the losses {losses} differ, so these are not the same computation.")
        memory = {name: statistics.median(run["MiB"] for run in runs) for name, runs in results.items()}
        seconds = {
            name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()
        }
        rows += [
            {
                "stage": stage, "way": name, "MiB": memory[name], "seconds": seconds[name],
                "times ours' MiB": memory[name] / memory["ours"],
                "times ours' seconds": seconds[name] / seconds["ours"], "all": results[name],
            }
            for name in implementations
        ]  # fmt: skip
    print("peak memory above models, gradients and optimiser state; time of forward and backward; medians")
    print(format_table(rows, COLUMNS))
    write_result("distillation-cost", device, {"settings": settings, "rows": rows}, args.results)


def measure(args: argparse.Namespace, stage: int, implementation: str, device: torch.device) -> dict:
    """Loss, seconds of each step, and peak memory in MiB."""
    teacher, student = make_models(args, device)
    loss_function, trained = make_loss(teacher, student, stage, implementation)
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(4, args.vocabulary, (1, args.length), generator=generator).to(device)}
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    seconds = []
    before = reset_peak_memory(device)
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = loss_function(batch)
        loss.backward()
        value = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        del loss
        optimizer.zero_grad(set_to_none=False)
    return {"loss": value, "seconds": seconds[1:], "MiB": (peak_memory(device) - before) / 2**20}


def make_models(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A teacher with random weights, and a linear student seeded from it."""
    torch.manual_seed(0)
    text = {
        "vocab_size": args.vocabulary, "hidden_size": args.hidden, "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers, "num_embedding_layers": args.layers // 4,
        "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 128,
    }  # fmt: skip
    config = MmMambaConfig(text_config=text, vision_config={"image_size": 28, "patch_size": 14}, image_token_id=3)
    teacher = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    state, config = seed_state_dict(teacher.state_dict(), config, ())
    student = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32)
    student.load_state_dict(state)
    return teacher.to(device), student.to(device).requires_grad_(False)


Loss = Callable[[dict[str, Tensor]], Tensor]


def make_loss(teacher, student, stage: int, implementation: str) -> tuple[Loss, list[nn.Parameter]]:
    """A function from a batch to the stage's loss, and the parameters that it trains."""
    distiller = EndToEndDistiller(teacher, student) if stage == 3 else LayerwiseDistiller(teacher, student, stage)
    trained = [p for p in distiller.parameters() if p.requires_grad]
    if implementation == "ours":
        return lambda batch: distiller(**batch), trained
    if stage == 3:
        return naive_end_to_end_loss(teacher, student), trained
    return naive_layerwise_loss(teacher, student, mixers_only=implementation == "mixers"), trained


def naive_end_to_end_loss(teacher, student) -> Loss:
    """Stage 3 with both models' logits of all positions."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(**batch, use_cache=False).logits.float()
        logits = student(**batch, use_cache=False).logits.float()
        kl = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="sum", log_target=True)
        return kl / batch["input_ids"].numel()

    return loss


def naive_layerwise_loss(teacher, student, mixers_only: bool) -> Loss:
    """Stages 1 and 2 with one backward pass over all layers."""
    inputs, teacher_heads, student_heads = {}, {}, {}  # by layer
    mixers = mamba_mixers(student)

    def store_input(tensors: dict[int, Tensor], layer: int):
        def hook(module, args, kwargs):
            tensors[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def replace_input(layer: int):
        def hook(module, args, kwargs):
            return ((inputs[layer], *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": inputs[layer]})

        return hook

    for layer, mixer in mixers.items():
        attention = teacher.model.layers[layer].self_attn
        attention.register_forward_pre_hook(store_input(inputs, layer), with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(store_input(teacher_heads, layer), with_kwargs=True)
        if not mixers_only:
            mixer.register_forward_pre_hook(replace_input(layer), with_kwargs=True)
            mixer.out_proj.register_forward_pre_hook(store_input(student_heads, layer), with_kwargs=True)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher.model(**batch, use_cache=False)
        if mixers_only:
            student_heads.update({layer: mixer.heads(inputs[layer]).flatten(2) for layer, mixer in mixers.items()})
        else:
            student.model(**batch, use_cache=False)
        errors = [(student_heads.pop(layer) - teacher_heads.pop(layer)).square().mean() for layer in mixers]
        return LOSS_SCALE * torch.stack(errors).mean()

    return loss
