"""What may change when a run goes on, who may go on with it, and how a stream is taken up where it stopped."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch
from distill_runs import (
    ACCUMULATION,
    make_teacher,
    quick_runs,
    results,
    same_weights,
    small_recipe,
    stop,
    weights,
    write_conversations,
)
from forked import run_ranks

from mmmamba.conversion.distillation import lock
from mmmamba.conversion.distillation import run as command
from mmmamba.conversion.distillation.data.encoding import ConversationEncoder
from mmmamba.conversion.distillation.folder import RunFolder
from mmmamba.conversion.distillation.lock import ProcessLock
from mmmamba.conversion.distillation.run import distill


@pytest.fixture(scope="module", autouse=True)
def without_delays():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def recipe(teacher):
    """From a run's folder and overrides to a recipe."""
    return partial(small_recipe, teacher)


# --- what may change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["shapes", "file", "stream"])
def test_memory_settings_change_after_a_checkpoint_and_the_weights_do_not(data, recipe, tmp_path, monkeypatch):
    """As after running out of memory: smaller micro-batches, chunks, recomputed activations, other workers."""
    options = ["stages=[3]", "stage_3.batch_size=4", "stage_3.per_device_batch_size=4", "bad_share=0.5"]
    if data != "shapes":
        entry = f"file: {write_conversations(tmp_path)}"
        if data == "stream":
            monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
            entry = f"dataset: json, data_{entry.replace('file', 'files')}, streaming: true"
        options.append(f"data=[{{{entry}}}]")
    distill(recipe(tmp_path / "whole", *options))
    assert stop(recipe(tmp_path / "cut", *options)) == [0, 1, 2]
    moved = ["per_device_batch_size=1", "logits_chunk=7", "gradient_checkpointing=true"]
    moved = [f"stage_3.{key}" for key in moved] + ["attn_implementation=eager", "workers=2"]
    distill(recipe(tmp_path / "cut", *options, *moved))
    one, two = (results(tmp_path / run)["stage_3"] for run in ("whole", "cut"))
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_refusal_names_the_key_and_what_to_remove(recipe, tmp_path):
    folder = tmp_path / "run"
    distill(recipe(folder, "stages=[1]"), "seed")
    stop(recipe(folder, "stages=[1, 3]"), step=3)
    with pytest.raises(ValueError) as error:
        distill(recipe(folder, "stages=[1, 3]", "stage_1.learning_rate=1"))
    assert str(error.value) == (
        f"{folder} holds a run with another stage_1.learning_rate; give another output=FOLDER, set it as in "
        f"{folder / 'recipe.yaml'}, or remove {folder / 'stage-1'} to train from stage 1 on again."
    )


def test_a_run_goes_on_from_another_working_directory(recipe, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_conversations(tmp_path)
    options = ["stages=[1]", "bad_share=0.5", "workers=0"]
    stop(recipe("run", *options, f"data=[{{file: {file.name}}}]"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative = os.path.relpath(teacher)
    distill(recipe("../run", *options, f"data=[{{file: ../{file.name}}}]", f"teacher={relative}"))
    assert (tmp_path / "run" / "model").is_dir()
    assert "is gone" not in capsys.readouterr().out  # the recorded paths were found


def test_what_stands_in_the_place_of_a_file_that_is_gone_is_named(recipe, tmp_path, capsys):
    file = write_conversations(tmp_path)
    options = ["stages=[1]", "bad_share=0.5", "workers=0"]
    stop(recipe(tmp_path / "run", *options, f"data=[{{file: {file}}}]"))
    other = file.rename(tmp_path / "other.jsonl")
    capsys.readouterr()
    distill(recipe(tmp_path / "run", *options, f"data=[{{file: {other}}}]"))
    assert f"WARNING: {file} is gone, so {other} is taken for the same" in capsys.readouterr().out


def test_own_answers_under_fsdp_are_refused_before_any_stage_is_trained(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"on_policy .* needs whole weights"):
        distill(recipe(tmp_path / "run", "stage_3.on_policy=0.5"))
    assert not (tmp_path / "run" / "seeded").exists()


# --- one run at a time -----------------------------------------------------------------------------------------------


def hold(path, rank, pipe, with_child=False):
    """Holds a lock until it is killed; with a child of its own, as DataLoader workers are."""
    path.mkdir(exist_ok=True)
    assert ProcessLock(path, rank).acquire() is None
    child = None
    if with_child:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    pipe.send(None if child is None else child.pid)
    pipe.recv()


@pytest.fixture
def start_holder():
    """Starts `hold`; what it leaves is killed at the end."""
    context, started = multiprocessing.get_context("fork"), []

    def start(*args):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(args[0], args[1], theirs, *args[2:]))
        process.start()
        started.append((process, ours))
        return process, ours.recv()

    yield start
    for process, _ in started:
        process.kill()
        process.join()


def test_a_second_start_is_told_which_process_is_running(recipe, tmp_path, start_holder):
    folder = tmp_path / "run"
    process, _ = start_holder(folder, 0)
    for other in (recipe(folder), recipe(folder, "seed=1")):  # not to remove what is being written
        with pytest.raises(ValueError) as error:
            distill(other, "seed")
        assert str(error.value).startswith(f"Another start is running in {folder}: process {process.pid} on ")
        assert str(error.value).endswith("; wait for it or end it, or give another output=FOLDER.")
        assert "remove" not in str(error.value)
    assert not (folder / "recipe.yaml").exists()


def test_a_process_that_a_killed_launcher_left_is_seen(recipe, tmp_path, start_holder):
    process, _ = start_holder(tmp_path / "run", 3)
    with pytest.raises(ValueError, match=f"Another start is running in .*: process {process.pid} on "):
        distill(recipe(tmp_path / "run"), "seed")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    distill(recipe(tmp_path / "run"), "seed")


def test_workers_of_a_killed_process_do_not_keep_its_lock(recipe, tmp_path, start_holder):
    process, child = start_holder(tmp_path / "run", 0, True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        distill(recipe(tmp_path / "run"), "seed")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_second_start_in_the_same_process_is_refused(recipe, tmp_path):
    """As in a notebook. Once the first has ended, it may go on."""
    folder = RunFolder(tmp_path / "run")
    with folder.claim(recipe(tmp_path / "run")):
        with pytest.raises(ValueError, match=f"Another start is running in .*: process {os.getpid()} on "):
            distill(recipe(tmp_path / "run"), "seed")
        with pytest.raises(ValueError, match="Another start is running"):  # the refused start took no lock with it
            distill(recipe(tmp_path / "run"), "seed")
    distill(recipe(tmp_path / "run"), "seed")


def test_without_locks_the_process_is_looked_for(recipe, tmp_path, start_holder, monkeypatch, capsys):
    process, _ = start_holder(tmp_path / "run", 0)
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(ValueError, match=f"Another start is running in .*: process {process.pid} on "):
        distill(recipe(tmp_path / "run"), "seed")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    distill(recipe(tmp_path / "run"), "seed")
    assert "has no locks, so a second start on another machine would not be noticed" in capsys.readouterr().out


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_decodes_nothing_that_was_used(workers, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = f"data=[{{dataset: json, data_files: {write_conversations(tmp_path)}, streaming: true}}]"
    options = [data, "stages=[1]", "bad_share=0.5", f"workers={workers}", "stage_1.steps=8", "save_every=6"]
    distill(recipe(tmp_path / "whole", *options))
    stop(recipe(tmp_path / "cut", *options), step=7)

    plain, log = ConversationEncoder.__call__, tmp_path / "decoded"

    def counting(self, record, *args, **kwargs):
        with log.open("a") as file:  # workers are processes
            file.write(json.dumps(record["conversations"][0]["value"]) + "\n")
        return plain(self, record, *args, **kwargs)

    monkeypatch.setattr(ConversationEncoder, "__call__", counting)
    distill(recipe(tmp_path / "cut", *options))
    same_weights(tmp_path / "cut", tmp_path / "whole")
    # Two steps of two rows are left; workers read ahead, and one record of five is bad.
    assert 4 <= len(log.read_text().splitlines()) <= (5 if not workers else 4 + 2 * 8 + 4)


# --- launches --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_kind_of_launch_is_refused_in_a_sentence(recipe, tmp_path):
    folder = tmp_path / "run"
    stop(recipe(folder, "stages=[1]"))
    marker = folder / "stage-1" / "checkpoints" / "checkpoint-2" / "complete"
    assert json.loads(marker.read_text()) == {"processes": 1, "launch": "one process or DDP"}
    marker.write_text(json.dumps({"processes": 2, "launch": "FSDP2 (SHARDED_STATE_DICT)"}))
    message = (
        r"^[^\n]*checkpoint-2 was written under FSDP2 \(SHARDED_STATE_DICT\) and this start is one process or DDP, "
        r"which cannot read it; start it as before, or remove \S*checkpoints to train the stage from its first step\.$"
    )
    with pytest.raises(ValueError, match=message):
        distill(recipe(folder, "stages=[1]"))


def warn_on_every_rank(recipe, folder):
    """A run in which something warns, with what each rank prints in a file."""
    command.train = lambda *_: logging.getLogger("transformers.anything").warning("a logged warning")
    with (folder / f"{os.environ['RANK']}.txt").open("w") as sys.stderr:
        handlers = logging.getLogger("transformers").handlers
        next(one for one in handlers if type(one) is logging.StreamHandler).setStream(sys.stderr)
        distill(recipe, "1")


def test_warnings_are_the_main_processs(recipe, tmp_path):
    run_ranks(warn_on_every_rank, tmp_path, recipe(tmp_path / "run", *ACCUMULATION), tmp_path)
    assert (tmp_path / "0.txt").read_text().count("a logged warning") == 1
    assert (tmp_path / "1.txt").read_text() == ""
