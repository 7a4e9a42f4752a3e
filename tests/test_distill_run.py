"""Whole distillation runs: chained, killed and resumed, on two processes, measured, refused.

The models and their training are tiny, so that a run takes seconds; what else takes time in a run is left out here.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from distill_runs import (
    ACCUMULATION,
    SMALL,
    make_teacher,
    quick_runs,
    results,
    same_weights,
    small_recipe,
    weights,
    write_conversations,
)
from forked import kill_this_process, run_killed, run_ranks
from safetensors.torch import load_file

import mmmamba
from mmmamba.cli import arguments
from mmmamba.conversion.distillation import run as command
from mmmamba.conversion.distillation import stages, trainer
from mmmamba.conversion.distillation.data.training_data import TrainingData, load_processor
from mmmamba.conversion.distillation.folder import RunFolder
from mmmamba.conversion.distillation.layerwise import LayerwiseDistiller
from mmmamba.conversion.distillation.placement import replacement_kl
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.distillation.run import distill
from mmmamba.conversion.distillation.trainer import DistillationTrainer
from mmmamba.conversion.shards import ShardWriter
from mmmamba.examples.shapes.evaluate import evaluate
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


SHAPES_TEACHER = Path(mmmamba.__file__).parent / "examples" / "shapes" / "teacher"


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


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """An uninterrupted run by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    parser = argparse.ArgumentParser()
    arguments.distill(parser)
    overrides = [*SMALL, *ACCUMULATION, f"teacher={teacher}", f"output={folder}"]
    with (
        redirect_stdout(io.StringIO()) as printed,
        redirect_stderr(io.StringIO()) as progress,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(stages, "plot_losses", trainer.plot_losses)
        command.run(parser.parse_args(["shapes-hybrid", *overrides]))
    return folder, printed.getvalue(), progress.getvalue()


def test_a_run_chains_its_stages_and_leaves_a_model_logs_plots_and_results(finished, teacher):
    folder, printed, progress = finished
    assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, .*loss [\d.]+, [\d,]+ tokens/s\]", progress)  # time left among it
    assert "stage 1: " in printed and "in_proj.weight (gate and dt rows)" in printed
    assert re.search(r"^stage 3: loss [\d.]+ after [\d,]+ tokens$", printed, re.MULTILINE)
    assert "WARNING" not in printed
    for number in (1, 2, 3):
        stage = folder / f"stage-{number}"
        assert results(folder)[f"stage_{number}"]["loss"] > 0 and results(folder)[f"stage_{number}"]["tokens"] > 0
        assert (stage / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert list((stage / "logs").glob("events.out.tfevents.*"))
        assert not (stage / "checkpoints").exists()
        assert len(json.loads((stage / "history.json").read_text())["history"]) >= 4
    model = MmMambaForConditionalGeneration.from_pretrained(folder / "model")
    assert model.config.text_config.layer_types == ["full_attention", "linear_attention"] * 2
    original = MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32)
    # Image and text embeddings and the head stay the teacher's; every mixer is trained.
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    seeded = load_file(folder / "seeded" / "model.safetensors")
    mixers = [name for name in seeded if ".mamba." in name]
    assert len(mixers) == 2 * 7
    for name in mixers:
        assert not torch.equal(weights(folder)[name], seeded[name].float()), name
    assert "distilled" in (folder / "model" / "README.md").read_text()


def kill_in_step(recipe, stage, step):
    """Runs a recipe and kills this process when it begins a step of a stage."""
    plain = DistillationTrainer.training_step

    def training_step(self, *args, **kwargs):
        if f"stage-{stage}" in self.args.output_dir and self.state.global_step == step:
            kill_this_process()
        return plain(self, *args, **kwargs)

    DistillationTrainer.training_step = training_step
    distill(recipe)


def test_a_killed_run_resumes_to_the_same_weights(finished, recipe, tmp_path, capsys):
    """Killed in stage 1, again in stage 3, then left to finish."""
    folder = tmp_path / "run"
    for stage in (1, 3):
        run_killed(kill_in_step, recipe(folder, *ACCUMULATION), stage, 3)
        assert not (folder / f"stage-{stage}" / "model").exists()
        checkpoints = folder / f"stage-{stage}" / "checkpoints"
        assert (checkpoints / "checkpoint-2" / "complete").is_file()
        # A checkpoint that the kill cut short must not be used.
        (checkpoints / "checkpoint-3").mkdir()
        (checkpoints / "checkpoint-3" / "trainer_state.json").write_text("{")
    distill(recipe(folder, *ACCUMULATION))
    assert f"stage 3: resumes from {checkpoints / 'checkpoint-2'}" in capsys.readouterr().out
    same_weights(folder, finished[0])
    for stage in (1, 2, 3):
        one, other = (
            [entry.get("loss") for entry in json.loads((f / f"stage-{stage}" / "history.json").read_text())["history"]]
            for f in (folder, finished[0])
        )
        assert one == other


def test_a_run_that_is_stopped_while_it_writes_goes_on(finished, recipe, tmp_path, monkeypatch):
    """In every model folder that it makes, once: seeded, the three stages', and the finished one."""
    write, stopped, folders = ShardWriter.write, set(), []

    def stopping(self, *arguments):
        name = f"{self._folder.parent.name}/{self._folder.name.split('.unfinished')[0]}"
        folders.append(name)
        if name not in stopped and folders.count(name) == 3:
            stopped.add(name)
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", stopping)
    folder = tmp_path / "run"
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            distill(recipe(folder, *ACCUMULATION))
        assert not (folder / "model").exists()
        assert not list(folder.rglob("*unfinished*"))
    distill(recipe(folder, *ACCUMULATION))
    assert len(stopped) == 5
    same_weights(folder, finished[0])


def test_what_a_process_that_was_killed_while_it_wrote_leaves_is_removed(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(ShardWriter, "write", kill_this_process)
    run_killed(distill, recipe(folder), "seed")
    (partial,) = folder.glob(".seeded.unfinished-*")
    assert not (folder / "seeded").exists()
    monkeypatch.undo()
    distill(recipe(folder), "seed")
    assert (folder / "seeded" / "model.safetensors").is_file() and not partial.exists()


def distill_with_output(recipe, folder):
    """A run whose rank writes what it prints to a file of its own."""
    with (folder / f"{os.environ['RANK']}.txt").open("w") as file, redirect_stdout(file):
        distill(recipe)


def test_two_processes_give_the_result_of_one(finished, recipe, tmp_path):
    """Stages 1 to 3 over gloo: the same conversations per step, split otherwise."""
    folder = tmp_path / "run"
    run_ranks(distill_with_output, tmp_path, recipe(folder, *ACCUMULATION), tmp_path)
    assert (tmp_path / "0.txt").read_text().count(" parameters train") == 3
    assert (tmp_path / "1.txt").read_text() == ""
    for number in (1, 2, 3):
        one, two = (results(run)[f"stage_{number}"] for run in (finished[0], folder))
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    for name, tensor in weights(finished[0]).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone_and_another_recipe_refused(finished, recipe):
    folder, *_ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    distill(recipe(folder, *ACCUMULATION))
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"holds a run with another seed, stage_3\.steps; give another output=FOLDER"):
        distill(recipe(folder, *ACCUMULATION, "seed=1", "stage_3.steps=6"))


def hold(path, recipe, pipe):
    with RunFolder(path).claim(recipe):
        pipe.send("claimed")
        pipe.recv()


def test_two_runs_in_one_folder_do_not_mix(recipe, tmp_path):
    """The second is refused while the first lives, however that ends."""
    folder, context = tmp_path / "run", multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(folder, recipe(folder), theirs), daemon=True)
    other.start()
    assert ours.recv() == "claimed"
    with pytest.raises(ValueError, match=rf"^Another start is running in \S*run: process {other.pid} on \S+, there "):
        distill(recipe(folder), "seed")
    assert not (folder / "seeded").exists()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    distill(recipe(folder), "seed")
    assert (folder / "seeded").is_dir()


def test_a_stage_started_from_nothing_says_so(recipe, tmp_path, capsys):
    distill(recipe(tmp_path / "run", "stages=[3]", "packing=true", "stage_3.steps=3"))
    printed = capsys.readouterr().out
    assert "WARNING: stage 3 starts from the seeded student, without stage 1 and 2 before it." in printed
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_stages_can_be_run_one_by_one(finished, recipe, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="no seeded student to start from"):
        distill(recipe(folder, *ACCUMULATION), "1")
    for step in ("seed", "1", "2", "3", "export"):
        assert not (folder / "model").exists()
        distill(recipe(folder, *ACCUMULATION), step)
    same_weights(folder, finished[0])


@pytest.fixture
def conversations(tmp_path):
    return write_conversations(tmp_path)


def stop_and_resume(recipe, monkeypatch):
    """A run that is interrupted in its fourth step and started again; the steps that it took, counted from 0."""
    plain, steps = DistillationTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe)
    distill(recipe)
    return steps


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_over_a_users_data_resumes_in_the_middle_of_an_epoch(
    recipe, tmp_path, conversations, streaming, monkeypatch
):
    data = f"[{{file: {conversations}}}]"
    if streaming:
        data = f"[{{dataset: json, data_files: {conversations}, split: train, streaming: true}}]"
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    options = [f"data={data}", "stages=[1]", "bad_share=0.2"]
    distill(recipe(tmp_path / "whole", *options))

    assert stop_and_resume(recipe(tmp_path / "cut", *options), monkeypatch) == [0, 1, 2, 3, 2, 3]
    same_weights(tmp_path / "cut", tmp_path / "whole")
    listed, expected = (tmp_path / run / "stage-1" / "bad_rows.jsonl" for run in ("cut", "whole"))
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert bad and all("3-0.png" in row["reason"] for row in bad)
    assert listed.read_text() == expected.read_text()


def test_a_stage_killed_before_its_model_was_written_takes_no_step_too_many(recipe, tmp_path, monkeypatch):
    distill(recipe(tmp_path / "whole", "stages=[1]"))

    def interrupt(*_):
        raise KeyboardInterrupt

    cut = recipe(tmp_path / "cut", "stages=[1]")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "plot_losses", interrupt)
        distill(cut)
    distill(cut)
    same_weights(tmp_path / "cut", tmp_path / "whole")
    assert results(tmp_path / "cut")["stage_1"]["tokens"] == results(tmp_path / "whole")["stage_1"]["tokens"]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_stage_that_diverges_ends_in_a_sentence_and_leaves_no_model(recipe, tmp_path, monkeypatch, log_every):
    plain = LayerwiseDistiller.forward
    monkeypatch.setattr(LayerwiseDistiller, "forward", lambda *args, **kwargs: plain(*args, **kwargs) * float("nan"))
    with pytest.raises(ValueError, match=r"stage-2 diverged: its loss is nan at step \d+; remove .*stage-2 and"):
        distill(recipe(tmp_path / "run", "stages=[2, 3]", f"log_every={log_every}"))
    assert not (tmp_path / "run" / "stage-2" / "model").exists() and not (tmp_path / "run" / "stage-3").exists()


def test_a_run_without_any_image_says_so_from_its_dataloader_worker(recipe, tmp_path, conversations, capsys):
    (tmp_path / "elsewhere").mkdir()
    data = f"data=[{{file: {conversations}, root: {tmp_path / 'elsewhere'}}}]"
    with pytest.raises(ValueError, match=r"^5 records in a row are bad and none is good; the first are [^\n]*$"):
        distill(recipe(tmp_path / "run", data, "stages=[1]", "workers=1"))
    assert capsys.readouterr().err.endswith("\n")  # behind the progress bar


def test_a_run_refused_for_its_data_goes_on_when_they_are_repaired(recipe, tmp_path, conversations):
    """Data of another name, a larger share of bad rows: the same folder goes on. Fewer tokens: it does not."""
    folder, data = tmp_path / "run", f"data=[{{file: {conversations}}}]"
    with pytest.raises(FileNotFoundError, match=r"mistyped\.jsonl does not exist"):
        distill(recipe(folder, "stages=[1]", "data=[{file: mistyped.jsonl}]"))
    assert not (folder / "seeded").exists()
    message = r"1 bad rows among 5 rows \(20.00%\) are more than the 1.00% that is allowed.* or allow a larger share"
    with pytest.raises(ValueError, match=message):
        distill(recipe(folder, "stages=[1]", data))
    assert (folder / "stage-1" / "checkpoints" / "checkpoint-2").is_dir()
    assert not (folder / "stage-1" / "model").exists()
    with pytest.raises(ValueError, match="holds a run with another max_tokens;"):  # a checkpoint depends on it
        distill(recipe(folder, "stages=[1]", data, "bad_share=0.5", "max_tokens=500"))
    distill(recipe(folder, "stages=[1]", data, "bad_share=0.5"))
    assert (folder / "stage-1" / "model").is_dir()


def test_a_stage_after_those_that_should_have_waited_for_it_is_refused(finished, recipe, tmp_path, capsys):
    early, folder = tmp_path / "early", tmp_path / "run"
    distill(recipe(early, "stage_2.steps=3"), "seed")
    distill(recipe(early, "stage_2.steps=3"), "2")
    assert "WARNING: stage 2 starts from the seeded student, without stage 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no finished stage 1 but stage-2, made without it; remove stage-2 to"):
        distill(recipe(early, "stage_2.steps=3"))
    shutil.rmtree(early / "stage-2")
    distill(recipe(early, "stage_2.steps=3"), "1")
    assert "WARNING" not in capsys.readouterr().out

    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "stage-3")
    with pytest.raises(ValueError, match=r"has no finished stage 3 but model, made without it; remove model to"):
        distill(recipe(folder, *ACCUMULATION))


def test_data_of_a_resumed_run_are_checked_before_it_trains(recipe, tmp_path, conversations):
    options = ["strategy=measured", "num_attention=2"]
    options += [f"{key}=[{{file: {conversations}}}]" for key in ("data", "held_out")]
    distill(recipe(tmp_path / "run", *options), "seed")
    for key in ("data", "held_out"):
        with pytest.raises(FileNotFoundError, match=r"nope.jsonl does not exist"):
            distill(recipe(tmp_path / "run", *options, f"{key}=[{{file: nope.jsonl}}]"))


def test_the_finished_model_appears_scored_and_with_its_card(recipe, tmp_path, monkeypatch, capsys):
    """A kill during the evaluation leaves no model; the next start scores it and writes the card."""
    folder = tmp_path / "run"
    scored = recipe(folder, "stages=[]", "evaluate=3", "base_model=someone/teacher", "name=Mine")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr("mmmamba.examples.shapes.evaluate.answers", interrupt)
        distill(scored)
    assert not (folder / "model").exists() and not list(folder.rglob("*unfinished*"))
    distill(scored)
    card = (folder / "model" / "README.md").read_text()
    assert "# Mine\n" in card and "base_model: someone/teacher" in card and "3 held-out questions" in card
    assert results(folder)["scores"]["questions"] == 3 and "questions right" in capsys.readouterr().out
    distill(scored)
    assert "questions right" not in capsys.readouterr().out


def test_a_card_that_exists_is_never_overwritten(recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    card = folder / "model" / "README.md"
    distill(recipe(folder, "stages=[]"))
    first, written = card.read_text(), (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert "held-out questions" not in first
    scored = recipe(folder, "stages=[]", "evaluate=3", "name=Mine")
    distill(scored)
    assert card.read_text() == first
    assert f"{card} exists and stays as it is; remove it to get one with these scores" in capsys.readouterr().out
    card.unlink()
    distill(scored)
    assert "# Mine\n" in card.read_text() and "3 held-out questions" in card.read_text()
    card.write_text("My own words.")
    distill(recipe(folder, "stages=[]", "evaluate=3", "name=Other"))
    assert card.read_text() == "My own words."
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == written
    # Another model has other scores.
    shutil.rmtree(folder / "model")
    distill(recipe(folder, "stages=[]"))
    assert "held-out questions" not in card.read_text() and "scores" not in results(folder)


def test_a_folder_that_processes_do_not_share_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mmmamba.conversion.distillation.folder.gather_object", lambda mine: [*mine, False])
    with pytest.raises(FileNotFoundError, match=r"Not every process sees \S*recipe.yaml, which the first one wrote"):
        distill(recipe(tmp_path / "run"))


def test_a_measured_placement_keeps_the_costliest_layers(recipe, teacher, tmp_path):
    # Two batches of four conversations, of which the device holds two at once.
    options = ["strategy=measured", "num_attention=2", "measure_batches=2", "stages=[2, 3]", "stage_2.steps=3"]
    measured = recipe(tmp_path / "run", *ACCUMULATION, *options, "stage_3.steps=3")
    distill(measured)
    placement = results(tmp_path / "run")["placement"]
    costs, chosen = placement["kl_per_token"], placement["attention"]
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "run" / "placed")
    original = MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    trained = load_file(tmp_path / "run" / "stage-2" / "model" / "model.safetensors")
    # Each layer's cost again, from a hybrid of its own and plain logits.
    batches = list(TrainingData(measured, teacher).held_out(4, 2))
    assert len(costs) == 4
    for layer, cost in enumerate(costs):
        config = copy.deepcopy(original.config)
        config.text_config.layer_types = ["full_attention"] * 4
        config.text_config.layer_types[layer] = "linear_attention"
        hybrid = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
        own = {name: x for name, x in trained.items() if name.startswith(f"model.layers.{layer}.")}
        hybrid.load_state_dict({name: own.get(name, original.state_dict().get(name)) for name in hybrid.state_dict()})
        found = []
        for batch in batches:
            answers = batch["labels"][:, 1:] != -100
            with torch.no_grad():
                p, q = (x(**batch).logits[:, :-1].double().log_softmax(-1)[answers] for x in (original, hybrid))
            found.append((p.exp() * (p - q)).sum(-1))
        assert cost == pytest.approx(float(torch.cat(found).mean()), rel=1e-3)
    assert min(costs[i] for i in chosen) >= max(costs[i] for i in range(4) if i not in chosen)
    for layer, kind in enumerate(model.config.text_config.layer_types):
        assert (kind == "full_attention") == (layer in chosen)
        if layer in chosen:
            query = model.model.layers[layer].self_attn.q_proj.weight
            assert torch.equal(query, original.model.layers[layer].self_attn.q_proj.weight)
        else:
            name = f"model.layers.{layer}.mamba.conv1d.weight"
            assert torch.equal(model.state_dict()[name], trained[name])
    # A teacher that is held in another dtype than its student.
    student = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "run" / "stage-2" / "model").float().eval()
    assert replacement_kl(original.bfloat16(), student, batches) == pytest.approx(costs, rel=0.3)


def test_bf16_with_a_dataloader_worker_resumes_to_the_same_weights(recipe, tmp_path, monkeypatch):
    """As recipes are by default, in stage 2."""
    options = ["precision=bf16", "workers=1", "stages=[2]"]
    distill(recipe(tmp_path / "whole", *options))
    with monkeypatch.context() as patch:
        stop_and_resume(recipe(tmp_path / "cut", *options), patch)
    same_weights(tmp_path / "cut", tmp_path / "whole")
    distill(recipe(tmp_path / "exact", *options, "precision=fp32"))
    expected = weights(tmp_path / "whole")
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "exact").items())


def test_stage_3_with_gradient_checkpointing_and_a_tied_teacher(recipe, teacher, tmp_path):
    tied = MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32)
    tied.config.text_config.tie_word_embeddings = tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    folder = tmp_path / "tied"
    shutil.copytree(teacher, folder)
    (folder / "model.safetensors").unlink()
    tied.save_pretrained(folder)
    options = ["stages=[3]", "stage_3.steps=3", f"teacher={folder}"]
    for checkpointing in ("true", "false"):
        distill(recipe(tmp_path / checkpointing, *options, f"stage_3.gradient_checkpointing={checkpointing}"))
    expected = weights(tmp_path / "false")
    assert all(torch.allclose(expected[name], x, atol=1e-6) for name, x in weights(tmp_path / "true").items())


def test_nothing_is_exported_before_the_last_stage(recipe, tmp_path):
    folder = tmp_path / "run"
    for done in ("seed", "1"):
        distill(recipe(folder), done)
        with pytest.raises(ValueError, match=r"stage-3 of .* is not finished, so there is nothing to export yet"):
            distill(recipe(folder), "export")
    # What has not begun may be changed; what has, not.
    others = ["stage_3.logits_chunk=64", "stage_2.steps=6"]
    distill(recipe(folder, *others), "seed")
    with pytest.raises(ValueError, match=r"holds a run with another stage_1\.learning_rate;"):
        distill(recipe(folder, *others, "stage_1.learning_rate=1"), "seed")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=nowhere"], "nowhere is no model folder: it has no config.json"),
        (["stage_1.batch_size=3"], "stage_1.batch_size=3 cannot be split"),
        (["strategy=measured", "num_attention=2", "stages=[1, 2]"], "stages=[1, 2] lacks one of them"),
        (["strategy=measured", "num_attention=2", "measure_batches=0"], "measure_batches=0 must be at least 1"),
        (
            ["strategy=measured", "num_attention=2", "held_out=[{file: none.jsonl}]", "data=[{file: x.jsonl}]"],
            "none.jsonl",
        ),
        (["strategy=measured", "num_attention=4"], "num_attention=4 must lie between 1 and 3"),
        (["strategy=measured", "num_attention=2", "data=[{file: x.jsonl}]"], "needs held_out in the recipe"),
        (["data=[{shapes: train}, {file: x.jsonl}]"], "is more than the picture world"),
        (["data=[{file: x.jsonl}]"], "x.jsonl does not exist"),
        (["held_out=[{fil: x.jsonl}]"], "did you mean file for fil?"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(recipe, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError), match=r"^[^\n]*$") as error:
        distill(recipe(tmp_path / "run", *overrides))
    assert message in str(error.value)
    assert not (tmp_path / "run" / "seeded").exists()


def test_a_model_of_another_world_is_not_scored_on_the_pictures(tmp_path):
    shutil.copytree(SHAPES_TEACHER, tmp_path / "other")
    config = json.loads((SHAPES_TEACHER / "config.json").read_text())
    config["text_config"]["vocab_size"] = 700
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    message = r"^\S*other was not made for the picture world: it has 700 tokens [^\n]*$"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        distill(load_recipe("shapes-hybrid", [f"teacher={tmp_path / 'other'}", f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no run"):
        distill(recipe(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_the_models_read_tiles_as_the_processor_gives_them(recipe, teacher, tmp_path):
    """Rows hold levels of 0 to 255, which the trainer is to normalise."""
    made = recipe(tmp_path / "run", "stages=[1]", "stage_1.steps=1", "stage_1.warmup=0", "stage_1.decay=0")
    distill(made)
    entry = json.loads((tmp_path / "run" / "stage-1" / "history.json").read_text())["history"][0]
    data, of_images = TrainingData(made, teacher), load_processor(teacher).image_processor
    batch = data.collate([data.for_stage(1)[index] for index in range(made.stage(1).batch_size)])
    assert batch["pixel_values"].dtype == torch.uint8
    mean, std = (torch.tensor(values)[:, None, None] for values in (of_images.image_mean, of_images.image_std))
    batch["pixel_values"] = (batch["pixel_values"] / 255 - mean) / std
    folders = (teacher, tmp_path / "run" / "seeded")
    models = (MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    expected = LayerwiseDistiller(*models, stage=1)(**{k: v for k, v in batch.items() if k != "num_rows"})
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-5)
