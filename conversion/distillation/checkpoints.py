"""Checkpoints of the Trainer that a kill cannot leave half-written: a marker file is written last.

checkpoints/checkpoint-500/complete    {"processes": 8, "workers": 1}, how the data were read
"""

import re
import shutil
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments

from mmmamba.conversion.shards import write_json


MARKER = "complete"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part of it, with how many processes there were."""

    def on_step_end(self, args, state, control, **kwargs):
        # The last step is followed by the finished model. A run that resumed there would take a step too many.
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER, data_readers(args))


def data_readers(args: TrainingArguments) -> dict[str, int]:
    """What the order of a stream depends on: processes, and each process's DataLoader workers."""
    return {"processes": args.world_size, "workers": args.dataloader_num_workers}


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
