"""Run by `test_distillation.py` on two processes: gradients of sharded distillers against those of one process."""

import torch
import torch.distributed as dist
from test_distillation import pair, rows
from torch.distributed.fsdp import fully_shard

from mmmamba.conversion.distillation.data import pad
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.layerwise import LayerwiseDistiller
from mmmamba.conversion.distillation.losses import count_tokens


def make(stage):
    teacher, student = pair(attention=(1,), dtype=torch.float32)
    student.train()
    return (
        EndToEndDistiller(teacher, student, "decoder") if stage == 3 else LayerwiseDistiller(teacher, student, stage)
    )


dist.init_process_group("gloo")
shares = [pad(rows()[i : i + 2], 2) for i in (0, 2)]
totals = sum(count_tokens(share) for share in shares)
for stage in (1, 2, 3):
    whole = make(stage)
    whole(**pad(rows(), 2)).backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}

    sharded = make(stage)
    if stage == 3:  # a decoder layer is a unit, as `_no_split_modules` says
        sharded.student.gradient_checkpointing_enable()
        for layer in sharded.student.model.layers:
            fully_shard(layer)
    fully_shard(sharded)
    # Gradients are averaged over the two processes, and a share of the loss is summed: hence the factor.
    (2 * sharded(**shares[dist.get_rank()], num_items_in_batch=totals)).backward()
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-9)
        assert error < 1e-4, (stage, name, float(error))
    if dist.get_rank() == 0:
        print(f"stage {stage}: {len(found)} gradients agree", flush=True)
dist.destroy_process_group()
