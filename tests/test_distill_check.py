"""What `mmmamba distill` says without training: the data, the memory and the disk."""

import json
import shutil
from functools import partial

import pytest
import torch
from distill_runs import make_teacher, quick_runs, results, small_recipe, stop, write_conversations
from safetensors import safe_open
from safetensors.torch import load_file

from mmmamba.cli.main import main
from mmmamba.conversion.distillation.data.training_data import TrainingData
from mmmamba.conversion.distillation.memory import disk, memory_table, stage_memory
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.distillation.run import distill
from mmmamba.conversion.distillation.stages import load_teacher_config


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


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_data_are_checked_without_the_teachers_weights(streaming, workers, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    bare, output = tmp_path / "bare", tmp_path / "run"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_conversations(tmp_path)
    entry = f"dataset: json, data_files: {file}, streaming: true" if streaming else f"file: {file}"
    arguments = [f"teacher={bare}", f"output={output}", f"data=[{{{entry}}}]", f"workers={workers}"]
    assert main(["distill", "shapes-hybrid", *arguments, "--check-data", "5"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "rows read        5\n" in printed
    if not (streaming and workers):  # two readers of five records come to the second epoch, in which rows are new
        assert "bad rows         1 (16.67%)\n                1  its image … does not exist\n" in printed
    assert "3-0.png does not exist" in printed
    assert not output.exists()
    # The same from the rows themselves.
    data = TrainingData(load_recipe("shapes-hybrid", arguments), bare)
    rows = data.for_stage(1)
    if not streaming:
        lengths = [len(rows[i]["input_ids"]) for i in range(5)]
        tiles = [len(rows[i]["pixel_values"]) for i in range(5)]
        assert f"tokens           {sum(lengths) / 5:,.1f} on average, at most {max(lengths):,}\n" in printed
        assert f"tiles            {sum(tiles) / 5:,.1f} on average, at most {max(tiles):,}" in printed


def test_stage_4s_own_data_are_checked_too(teacher, tmp_path, capsys):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    files = [tmp_path / "one.jsonl", tmp_path / "four.jsonl"]
    for file, count in zip(files, (3, 5), strict=True):
        file.write_text(f"{json.dumps({'conversations': turns})}\n" * count)
    options = [f"data=[{{file: {files[0]}}}]", "stages=[1,4]", f"stage_4.data=[{{file: {files[1]}}}]", "workers=0"]
    options += [
        "stage_4.steps=1",
        "stage_4.learning_rate=1",
        "stage_4.batch_size=1",
        "stage_4.per_device_batch_size=1",
    ]
    assert main(["distill", "shapes-hybrid", f"teacher={teacher}", *options, "--check-data", "9"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("stage 1\nrows read        3\n") and second.startswith("stage 4\nrows read        5\n")


def test_data_that_a_run_would_stop_at_are_called_so(teacher, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    good = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    file.write_text("\n".join([good] * 20 + ["{"] * 20) + "\n")
    arguments = ["distill", "shapes-hybrid", f"teacher={teacher}", f"data=[{{file: {file}}}]", "--check-data", "1000"]
    assert main([*arguments, "workers=0"]) == 0
    printed = capsys.readouterr().out
    assert "rows read        40\n" in printed and "               20  it is broken JSON" in printed
    assert printed.endswith("A run would stop: it allows bad_share=1.00%.\n")
    assert main([*arguments, "workers=0", "bad_share=0.6"]) == 0
    assert "would stop" not in capsys.readouterr().out


def test_a_short_run_over_bad_rows_stops_at_its_first_steps(recipe, tmp_path):
    """Four steps of two rows, of a file of a thousand."""
    file = tmp_path / "train.jsonl"
    good = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    file.write_text("\n".join([good, "{", "{", "{"] * 250) + "\n")
    with pytest.raises(ValueError, match=r"^\d bad rows among \d rows .* are more than the 1.00% that is allowed"):
        distill(recipe(tmp_path / "run", "stages=[1]", f"data=[{{file: {file}}}]"))
    assert not (tmp_path / "run" / "model").exists()


# --- memory and disk -------------------------------------------------------------------------------------------------


def stored(file):
    """Bytes of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())


@pytest.mark.parametrize("trainable", ["mixers", "decoder"])
def test_memory_and_disk_are_those_of_a_run(trainable, recipe, teacher, tmp_path):
    folder = tmp_path / "run"
    made = recipe(folder, f"stage_3.trainable={trainable}", "teacher_dtype=bfloat16", "dtype=bfloat16")
    config = load_teacher_config(made)
    found = {one.stage: one for one in stage_memory(made, config)}
    checkpoints = {}
    for number in (1, 2, 3):
        stop(made, step=3, stage=number)
        checkpoint = folder / f"stage-{number}" / "checkpoints" / "checkpoint-2"
        moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        written = stored(checkpoint / "model.safetensors")
        assert written == found[number].student
        written += sum(state[name].nbytes for state in moments.values() for name in ("exp_avg", "exp_avg_sq"))
        assert written == found[number].checkpoint
        checkpoints[number] = written
    distill(made)
    for number in (1, 2, 3):
        assert 4 * sum(results(folder)[f"stage_{number}"]["trained"].values()) == found[number].gradients
        assert found[number].optimizer == 2 * found[number].gradients
        assert stored(folder / f"stage-{number}" / "model" / "model.safetensors") == found[number].model
    teacher_size = sum(tensor.numel() for tensor in load_file(teacher / "model.safetensors").values())
    assert {one.teacher for one in found.values()} == {2 * teacher_size}
    kept, most = disk(made, config)
    assert kept == sum(stored(file) for file in folder.rglob("model.safetensors"))
    # Two checkpoints stay while a third is written, beside the models that there are by then.
    models = [stored(folder / name / "model.safetensors") for name in ("seeded", "stage-1/model", "stage-2/model")]
    assert most == max(sum(models[:number]) + 3 * checkpoints[number] for number in (1, 2, 3))


def test_the_published_size_is_what_it_was_found_to_be():
    recipe = load_recipe("hovle-hybrid", ["teacher=mmmamba:."])
    config = load_teacher_config(recipe)
    assert stage_memory(recipe, config)[-1].ddp / 2**30 == pytest.approx(18.4, abs=0.05)
    lines = memory_table(recipe, config).splitlines()
    assert lines[3] == "    3      4.5      9.4        1.1     2.3     17.3      18.4         14.3        11.6"
    assert len(lines) == 5
    # The whole decoder, counted by hand: 24 mixers with output projection, 8 attention layers, 32 MLPs and norms.
    mixer = 2048 * (2 * 1024 + 2 * 2048 + 16) + 4096 * (2 + 1) + 2 * 16 + 128 + 2048 * 2048
    trained = 24 * mixer + 8 * 2 * 2048 * (2048 + 1024) + 32 * (3 * 2048 * 8192 + 2 * 2048)
    decoder = stage_memory(load_recipe("hovle-hybrid", ["teacher=mmmamba:.", "stage_3.trainable=decoder"]), config)[-1]
    assert decoder.gradients == 4 * trained
    assert decoder.ddp / 2**30 == pytest.approx(45.4, abs=0.05)
