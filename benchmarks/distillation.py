"""Peak memory and time of the three distillation stages, against straightforward implementations of the same losses.

mmmamba bench distillation                          # 32 layers
mmmamba bench distillation --layers 8 --length 512   # smaller

`straight` is what one writes first: the teacher in full, whose attention inputs and heads are kept; the student in
full with autograd over all its layers, each mixer reading the teacher's input; one backward pass. `mixers` is more
careful: it runs nothing of the student but the mixers, and still one backward pass over all of them. In stage 3,
`straight` holds both models' logits of all positions. The losses are checked to be equal. Every measurement is a
process of its own, and the implementations take turns. Gradients and the optimiser's state, the same for all, are
there before.
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

from .memory import in_a_process, most, now
from .timing import table, write


WAYS = {1: ("ours", "straight", "mixers"), 2: ("ours", "straight", "mixers"), 3: ("ours", "straight")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the one conversation in a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that each process times")
    parser.set_defaults(rounds=3)
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "WAY"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace, device: torch.device) -> None:
    if args.one:
        print(json.dumps(measure(args, int(args.one[0]), args.one[1], device)))
        return
    settings = {name: getattr(args, name) for name in ("layers", "hidden", "vocabulary", "length", "steps")}
    command = ["distillation", f"--device={args.device}", f"--threads={torch.get_num_threads()}"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    rows = []
    for stage, ways in WAYS.items():
        found = {way: [] for way in ways}
        for turn in range(args.rounds):
            for way in (ways, ways[::-1])[turn % 2]:
                found[way].append(in_a_process([*command, "--one", str(stage), way]))
        losses = [results[0]["loss"] for results in found.values()]
        if max(losses) - min(losses) > 1e-3 * abs(losses[0]):
            raise RuntimeError(f"stage {stage}: the losses {losses} differ, so these are not the same computation.")
        memory = {way: statistics.median(one["MiB"] for one in results) for way, results in found.items()}
        seconds = {
            way: statistics.median(s for one in results for s in one["seconds"]) for way, results in found.items()
        }
        rows += [
            {
                "stage": stage, "way": way, "MiB": memory[way], "seconds": seconds[way],
                "times ours' MiB": memory[way] / memory["ours"], "times ours' seconds": seconds[way] / seconds["ours"],
                "all": found[way],
            }
            for way in ways
        ]  # fmt: skip
    print("peak memory above models, gradients and optimiser; time of forward and backward; medians")
    print(table(rows, ["stage", "way", "MiB", "seconds", "times ours' MiB", "times ours' seconds"]))
    write("distillation-cost", device, {"settings": settings, "rows": rows}, args.results)


def measure(args: argparse.Namespace, stage: int, way: str, device: torch.device) -> dict:
    """One way through one stage: loss, seconds of each step, MiB."""
    teacher, student = models(args, device)
    loss_of, trained = prepared(teacher, student, stage, way)
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(4, args.vocabulary, (1, args.length), generator=generator).to(device)}
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    seconds = []
    before = now(device, reset=True)
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = loss_of(batch)
        loss.backward()
        value = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        del loss
        optimizer.zero_grad(set_to_none=False)
    return {"loss": value, "seconds": seconds[1:], "MiB": (most(device) - before) / 2**20}


def models(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
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


def prepared(
    teacher, student, stage: int, way: str
) -> tuple[Callable[[dict[str, Tensor]], Tensor], list[nn.Parameter]]:
    """A function from a batch to the stage's loss, and the parameters that it trains."""
    if stage == 3:
        distiller = EndToEndDistiller(teacher, student)
        loss = (
            (lambda batch: distiller(**batch))
            if way == "ours"
            else (lambda batch: full_logits(teacher, student, batch))
        )
    else:
        distiller = LayerwiseDistiller(teacher, student, stage)
        loss = (lambda batch: distiller(**batch)) if way == "ours" else all_layers(teacher, student, way == "mixers")
    return loss, [p for p in distiller.parameters() if p.requires_grad]


def full_logits(teacher, student, batch: dict[str, Tensor]) -> Tensor:
    """Stage 3 with both models' logits of all positions."""
    with torch.no_grad():
        truth = teacher(**batch, use_cache=False).logits.float()
    logits = student(**batch, use_cache=False).logits.float()
    kl = F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), reduction="sum", log_target=True)
    return kl / batch["input_ids"].numel()


def all_layers(teacher, student, mixers_alone: bool) -> Callable[[dict[str, Tensor]], Tensor]:
    """Stages 1 and 2 with one backward pass over all layers."""
    inputs, targets, heads = {}, {}, {}
    mixers = mamba_mixers(student)

    def keep(found: dict[int, Tensor], layer: int):
        def hook(module, args, kwargs):
            found[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def exchange(layer: int):
        def hook(module, args, kwargs):
            return ((inputs[layer], *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": inputs[layer]})

        return hook

    for layer, mixer in mixers.items():
        attention = teacher.model.layers[layer].self_attn
        attention.register_forward_pre_hook(keep(inputs, layer), with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(keep(targets, layer), with_kwargs=True)
        if not mixers_alone:
            mixer.register_forward_pre_hook(exchange(layer), with_kwargs=True)
            mixer.out_proj.register_forward_pre_hook(keep(heads, layer), with_kwargs=True)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher.model(**batch, use_cache=False)
        if mixers_alone:
            heads.update({layer: mixer.heads(inputs[layer]).flatten(2) for layer, mixer in mixers.items()})
        else:
            student.model(**batch, use_cache=False)
        errors = [(heads.pop(layer) - targets.pop(layer)).square().mean() for layer in mixers]
        return LOSS_SCALE * torch.stack(errors).mean()

    return loss
