"""Checkpoints of the Trainer that a kill cannot leave half-written: a marker file is written last.

checkpoints/checkpoint-500/complete       {"processes": 8, "launch": "one process or DDP"}, how it was written
                           stream-0.json  if the data are a stream: where process 0 stands in it
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import TrainerCallback

from mmmamba.conversion.shards import read_json, write_json

from .data.stream import StreamLoader


MARKER = "complete"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class MarkCompleteCheckpoints(TrainerCallback):
    """Adds to a checkpoint where its stream stands, and marks it once every process has written its part of it."""

    def on_step_end(self, args, state, control, **kwargs):
        # The last step is followed by the finished model. A run that resumed there would take a step too many.
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control

    def on_save(self, args, state, control, train_dataloader=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if isinstance(train_dataloader, StreamLoader):
            write_json(stream_file(folder), train_dataloader.state_dict())
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_json(folder / MARKER, launch())


def launch() -> dict[str, Any]:
    """How many processes there are, and which kind of launch, on which a checkpoint's files depend."""
    state = AcceleratorState()
    kind = "one process or DDP"
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        kind = f"FSDP{plugin.fsdp_version} ({plugin.state_dict_type.name})"
    elif state.distributed_type == DistributedType.DEEPSPEED:
        kind = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    return {"processes": state.num_processes, "launch": kind}


def check_sharding() -> None:
    """Raises ValueError if FSDP or DeepSpeed is asked for and Accelerate runs DDP instead, as it does without GPUs."""
    state = AcceleratorState()
    for name, kind in (("FSDP", DistributedType.FSDP), ("DeepSpeed", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"
        if asked and state.num_processes > 1 and state.distributed_type != kind:
            raise ValueError(
                f"The launch asks for {name}, which Accelerate does on GPUs only, but its device is "
                f"{state.device.type}; start it where torch sees GPUs, or without {name}."
            )


def check_launch(checkpoint: Path) -> str | None:
    """What to warn of when this launch resumes a checkpoint, if anything.

    Raises:
        ValueError: if it cannot, as a launch of another kind wrote the checkpoint.
    """
    before, now = read_json(checkpoint / MARKER), launch()
    advice = f"start it as before, or remove {checkpoint.parent} to train the stage from its first step"
    if before.get("launch", now["launch"]) != now["launch"]:
        raise ValueError(
            f"{checkpoint} was written under {before['launch']} and this start is {now['launch']}, which cannot read "
            f"it; {advice}."
        )
    if before["processes"] == now["processes"]:
        return None
    for condition, what in (
        (now["launch"].startswith("DeepSpeed"), "its optimiser state is in as many parts"),
        (stream_file(checkpoint, 0).is_file(), "a stream is split among them"),
    ):
        if condition:
            raise ValueError(
                f"{checkpoint} was written by {before['processes']} processes and this start has "
                f"{now['processes']}, but {what}; {advice}."
            )
    return (
        f"WARNING: {before['processes']} processes wrote it and {now['processes']} resume it; sums may differ in "
        "their last digits."
    )


def stream_file(checkpoint: Path, process_index: int | None = None) -> Path:
    """Where a checkpoint says how far a process, this one if not given, has read a stream."""
    return checkpoint / f"stream-{PartialState().process_index if process_index is None else process_index}.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, the same one on every process. Removes incomplete ones."""
    newest = None
    if PartialState().is_main_process:
        steps = {
            int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
        }
        complete = [step for step, path in steps.items() if (path / MARKER).is_file()]
        for step in steps.keys() - set(complete):
            shutil.rmtree(steps[step])
        newest = max(complete, default=None)
    newest = from_main_process(newest)
    return None if newest is None else folder / f"checkpoint-{newest}"


def from_main_process(value):
    """The main process's value, on every process: all take the same branch, whatever a network file system shows."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
