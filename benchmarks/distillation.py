"""Peak memory and time per step of the three stages, against running teacher and student in full with autograd.

    python benchmarks/distillation.py                       # 32 layers, prints a table, writes JSON beside it
    python benchmarks/distillation.py --layers 8 --rows 512 # smaller

The straightforward implementation is what one writes first: run the teacher and keep each layer's attention input and
heads, run the student in full beside it under autograd, then one backward pass; stage 3 materialises both models'
logits over all positions. In stages 1 and 2 the loss needs the student's mixers alone, so its MLPs, which a student in
full runs, too, are part of what streaming saves. Both sides get the same loss, which is checked. Every measurement is
a process of its own; the two sides alternate.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path


def models(layers: int, hidden: int, vocabulary: int):
    import torch

    from mmmamba.configuration_mmmamba import MmMambaConfig
    from mmmamba.conversion.seeding import seed_state_dict
    from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_embedding_layers": layers // 4, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128,
    }  # fmt: skip
    config = MmMambaConfig(text_config=text, vision_config={"image_size": 28, "patch_size": 14}, image_token_id=3)
    teacher = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    state, config = seed_state_dict(teacher.state_dict(), config, ())
    student = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32)
    student.load_state_dict(state)
    return teacher, student


def straightforward(teacher, student, stage: int):
    """A function from a batch to the loss, written as one would without care for memory."""
    import torch
    import torch.nn.functional as F

    from mmmamba.conversion.distillation.layerwise import SCALE, mixers

    if stage == 3:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(".mamba." in name and "out_proj" not in name)

        def end_to_end(batch):
            with torch.no_grad():
                truth = teacher(**batch, use_cache=False).logits.float()
            logits = student(**batch, use_cache=False).logits.float()
            kl = F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), reduction="sum", log_target=True)
            return kl / batch["input_ids"].numel()

        return end_to_end

    learners = mixers(student)
    for mixer in learners.values():
        mixer.out_proj.requires_grad_(False)
    seen = {}
    for index in learners:
        attention = teacher.model.layers[index].self_attn

        def remember(module, args, kwargs, index=index):
            seen[index] = args[0] if args else kwargs["hidden_states"]

        def target(module, args, index=index):
            seen[-1 - index] = args[0]

        attention.register_forward_pre_hook(remember, with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(target)

    def layerwise(batch):
        with torch.no_grad():
            teacher(**batch, use_cache=False)
        # The student in full, as upstream's training code runs it: every layer with its MLP, on the teacher's states.
        rows = student.model.embed_tokens(batch["input_ids"])
        errors = []
        for index, layer in enumerate(student.model.layers):
            heads = learners[index].heads(layer.input_layernorm(rows) * 0 + seen[index])
            errors.append((heads.flatten(2) - seen[-1 - index]).square().mean())
            rows = rows + teacher.model.layers[index].self_attn.o_proj(seen[-1 - index])
            rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
        return SCALE * torch.stack(errors).mean()

    return layerwise


def measure(args: argparse.Namespace) -> None:
    """One side, one stage, in this process: prints JSON."""
    import torch

    from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
    from mmmamba.conversion.distillation.layerwise import LayerwiseDistiller

    torch.set_num_threads(args.threads)
    teacher, student = models(args.layers, args.hidden, args.vocabulary)
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(4, args.vocabulary, (1, args.rows), generator=generator)}
    if args.side == "plain":
        loss_of = straightforward(teacher, student, args.stage)
        trained = [p for p in student.parameters() if p.requires_grad]
    else:
        distiller = (
            EndToEndDistiller(teacher, student)
            if args.stage == 3
            else LayerwiseDistiller(teacher, student, args.stage)
        )
        trained = [p for p in distiller.parameters() if p.requires_grad]
        loss_of = lambda batch: distiller(**batch)  # noqa: E731
    # Gradients and the optimiser's state are the same on both sides; here they are part of what is there before.
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = loss_of(batch)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad(set_to_none=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"loss": loss.item(), "seconds": seconds[1:], "megabytes": (after - before) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=1024, help="tokens of the one conversation in a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args)
        return
    shape = [
        f"--{name}={getattr(args, name)}" for name in ("layers", "hidden", "vocabulary", "rows", "steps", "threads")
    ]
    rows = []
    for stage in (1, 2, 3):
        runs = {"ours": [], "plain": []}
        for _ in range(args.repeats):
            for side in runs:
                command = [sys.executable, __file__, *shape, f"--side={side}", f"--stage={stage}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
        losses = {side: runs[side][0]["loss"] for side in runs}
        if abs(losses["ours"] - losses["plain"]) > 1e-3 * abs(losses["plain"]):
            raise SystemExit(f"stage {stage}: the losses differ, {losses}; the two sides do not do the same")
        row = {"stage": stage, "loss": losses}
        for side, results in runs.items():
            row[f"{side}_seconds"] = statistics.median(second for result in results for second in result["seconds"])
            row[f"{side}_megabytes"] = statistics.median(result["megabytes"] for result in results)
        rows.append(row)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "shape": {name: getattr(args, name) for name in ("layers", "hidden", "vocabulary", "rows")},
        "rows": rows,
    }
    print("peak memory above models, gradients and optimiser; time of forward and backward\n")
    print("stage   ours MB  plain MB  times less   ours s  plain s  times faster")
    for row in rows:
        print(
            f"{row['stage']:5} {row['ours_megabytes']:9.0f} {row['plain_megabytes']:9.0f} "
            f"{row['plain_megabytes'] / row['ours_megabytes']:11.1f} {row['ours_seconds']:8.2f} "
            f"{row['plain_seconds']:8.2f} {row['plain_seconds'] / row['ours_seconds']:13.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
