"""Whole distillation runs: chained, killed and resumed, on two processes, measured, refused."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmmamba
from mmmamba.conversion.distillation.data.training_data import TrainingData
from mmmamba.conversion.distillation.placement import replacement_kl
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.distillation.run import distill
from mmmamba.conversion.distillation.trainer import DistillationTrainer, repeating_sampler
from mmmamba.conversion.shards import ShardWriter
from mmmamba.examples.shapes.evaluate import evaluate
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


TEACHER = Path(mmmamba.__file__).parent / "examples" / "shapes" / "teacher"
# Few steps, small batches, no bf16: quick, and equal to the last bit where it should be.
SMALL = [
    "precision=fp32", "dtype=float32", "save_every=2", "log_every=1", "evaluate=0", "workers=0",
    *(
        f"stage_{n}.{key}={value}"
        for n in (1, 2, 3)
        for key, value in {"steps": 5, "warmup": 1, "decay": 2, "batch_size": 4, "per_device_batch_size": 2}.items()
    ),
]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def command(folder, *overrides, launcher=()):
    return [
        sys.executable,
        *launcher,
        "-m",
        "mmmamba",
        "distill",
        "shapes-hybrid",
        *SMALL,
        f"output={folder}",
        *overrides,
    ]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    done = subprocess.run(command(folder), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_a_run_chains_its_stages_and_leaves_a_model_logs_plots_and_results(finished):
    folder, printed, progress = finished
    assert re.search(r"5/5 \[\d\d:\d\d<\d\d:\d\d, .*loss [\d.]+, [\d,]+ tokens/s\]", progress)  # time left among it
    assert "stage 1: " in printed and "in_proj.weight (gate and dt rows)" in printed
    assert "WARNING" not in printed
    results = json.loads((folder / "results.json").read_text())
    for number in (1, 2, 3):
        stage = folder / f"stage-{number}"
        assert results[f"stage_{number}"]["loss"] > 0 and results[f"stage_{number}"]["tokens"] > 0
        assert (stage / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert list((stage / "logs").glob("events.out.tfevents.*"))
        assert not (stage / "checkpoints").exists()
        assert len(json.loads((stage / "history.json").read_text())["history"]) >= 5
    model = MmMambaForConditionalGeneration.from_pretrained(folder / "model")
    assert model.config.text_config.layer_types == [
        "full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention",
        "linear_attention",
    ]  # fmt: skip
    teacher = MmMambaForConditionalGeneration.from_pretrained(TEACHER, dtype=torch.float32)
    # Pictures, words and the head stay the teacher's; every mixer learnt.
    assert torch.equal(model.lm_head.weight, teacher.lm_head.weight)
    seeded = load_file(folder / "seeded" / "model.safetensors")
    for name, tensor in weights(folder).items():
        if ".mamba." in name:
            assert not torch.equal(tensor, seeded[name].float()), name
    assert "distilled" in (folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path, stage):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = folder / f"stage-{stage}" / "checkpoints" / "checkpoint-2" / "complete"
    while not marker.exists():
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / f"stage-{stage}" / "model").exists()
    # A checkpoint that the kill cut short must not be used.
    broken = marker.parent.with_name("checkpoint-3")
    broken.mkdir(exist_ok=True)
    (broken / "trainer_state.json").write_text("{")
    again = subprocess.run(command(folder), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"stage {stage}: resumes from {marker.parent}" in again.stdout or "checkpoint-4" in again.stdout
    expected, found = weights(finished[0]), weights(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    history = [
        [entry.get("loss") for entry in json.loads((f / f"stage-{stage}" / "history.json").read_text())["history"]]
        for f in (folder, finished[0])
    ]
    assert history[0] == history[1]


def test_a_run_that_is_stopped_while_it_writes_goes_on(finished, tmp_path, monkeypatch):
    """In every folder that it makes, once: seeded, the three stages', and the finished model."""
    write, stopped, folders = ShardWriter.write, set(), []

    def stopping(self, *arguments):
        name = f"{self._folder.parent.name}/{self._folder.name.split('.unfinished')[0]}"
        folders.append(name)
        if name not in stopped and folders.count(name) == 3:
            stopped.add(name)
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", stopping)
    recipe = load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}"])
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
        assert not (tmp_path / "run" / "model").exists()
    distill(recipe)
    assert len(stopped) == 5 and not list((tmp_path / "run").rglob("*unfinished*"))
    expected = weights(finished[0])
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["8-gpus", "2-nodes", "fsdp2", "deepspeed-zero2"])
def test_launch_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(mmmamba.__file__).parent / "conversion" / "distillation" / "accelerate"
    config = load_config_from_file(str(folder / f"{name}.yaml"))
    assert config.num_processes == (16 if name == "2-nodes" else 8)
    assert config.mixed_precision in (None, "no")  # precision is the recipe's


def test_two_processes_give_the_result_of_one(finished, tmp_path):
    """Stages 1 to 3 over gloo: the same conversations per step, dealt out differently."""
    folder = tmp_path / "run"
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
    # accelerate launch takes `-m module` as `--module module`
    arguments = command(folder, launcher=launcher)
    arguments[arguments.index("-m", arguments.index("accelerate.commands.launch"))] = "--module"
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" parameters train") == 3  # one of them speaks
    for number in (1, 2, 3):
        one, two = (json.loads((f / "results.json").read_text())[f"stage_{number}"] for f in (finished[0], folder))
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    for name, tensor in weights(finished[0]).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone_and_another_recipe_refused(finished):
    folder, *_ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    distill(load_recipe("shapes-hybrid", [*SMALL, f"output={folder}"]))
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    with pytest.raises(ValueError, match="holds a run with another seed, stage_3; give another output=FOLDER"):
        distill(load_recipe("shapes-hybrid", [*SMALL, f"output={folder}", "seed=1", "stage_3.steps=6"]))


def test_a_stage_started_from_nothing_says_so(tmp_path, capsys):
    recipe = load_recipe("shapes-linear", [*SMALL, f"output={tmp_path / 'run'}", "stages=[3]", "packing=true"])
    distill(recipe)
    printed = capsys.readouterr().out
    assert "WARNING: stage 3 starts from the seeded student, without stage 1 and 2 before it." in printed
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_stages_can_be_run_one_by_one(tmp_path, finished):
    recipe = load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="no seeded student to start from"):
        distill(recipe, "1")
    for step in ("seed", "1", "2", "3", "export"):
        assert not (tmp_path / "run" / "model").exists()
        distill(recipe, step)
    expected = weights(finished[0])
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def conversations(tmp_path):
    """Eleven conversations of a user, one of them without its picture, as JSON Lines."""
    from mmmamba.examples.shapes.world import example

    lines = []
    for index in range(11):
        one = example("train", 0, index)
        images = [f"{index}-{i}.png" for i in range(len(one.pictures))]
        for name, picture in zip(images, one.pictures, strict=True):
            if index != 3:
                picture.draw().save(tmp_path / name)
        turns = [
            {"from": "human", "value": "<image>" * len(images) + "\n" + one.question},
            {"from": "gpt", "value": one.answer},
        ]
        lines.append(json.dumps({"image": images, "conversations": turns}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.jsonl"


def stopped_and_gone_on(overrides, monkeypatch):
    """A run that is interrupted at its eighth micro-batch and started again; the steps of all micro-batches."""
    plain, steps = DistillationTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    recipe = load_recipe("shapes-hybrid", overrides)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe)
    distill(recipe)
    return steps


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_over_a_users_data_goes_on_in_the_middle_of_an_epoch(tmp_path, conversations, streaming, monkeypatch):
    data = f"[{{file: {conversations}}}]"
    if streaming:
        data = f"[{{dataset: json, data_files: {conversations}, split: train, streaming: true}}]"
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    options = [*SMALL, f"data={data}", "stages=[1]", "stage_1.steps=8", "stage_1.per_device_batch_size=2",
               "bad_share=0.2", "stage_1.batch_size=2"]  # fmt: skip
    distill(load_recipe("shapes-hybrid", [*options, f"output={tmp_path / 'whole'}"]))

    steps = stopped_and_gone_on([*options, f"output={tmp_path / 'cut'}"], monkeypatch)
    assert steps == [*range(8), 6, 7]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "cut").items())
    listed = tmp_path / "cut" / "stage-1" / "bad_rows.jsonl"
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert bad and all("3-0.png" in row["reason"] for row in bad)


def test_a_stage_killed_before_its_model_was_written_takes_no_step_too_many(tmp_path, monkeypatch):
    options = [*SMALL, "stages=[1]", "stage_1.steps=4"]
    distill(load_recipe("shapes-hybrid", [*options, f"output={tmp_path / 'whole'}"]))

    def killed(*args):
        raise KeyboardInterrupt

    recipe = load_recipe("shapes-hybrid", [*options, f"output={tmp_path / 'cut'}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmmamba.conversion.distillation.stages.plot_losses", killed)
        distill(recipe)
    distill(recipe)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "cut").items())
    tokens = [
        json.loads((tmp_path / run / "results.json").read_text())["stage_1"]["tokens"] for run in ("whole", "cut")
    ]
    assert tokens[0] == tokens[1]


def test_every_pass_reads_every_row_in_another_order():
    rows = list(range(7))
    read = list(repeating_sampler(rows, 17, seed=3))
    assert sorted(read[:7]) == sorted(read[7:14]) == rows and len(read) == 17
    assert read[:7] != read[7:14] and read == list(repeating_sampler(rows, 17, seed=3))
    assert read != list(repeating_sampler(rows, 17, seed=4))


def test_a_run_without_any_picture_says_so_from_its_reading_process(tmp_path, conversations):
    options = [*SMALL, f"data=[{{file: {conversations}, root: {tmp_path / 'elsewhere'}}}]", "stages=[1]", "workers=1"]
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=r"^11 records in a row are bad and none is good; the first are [^\n]*$"):
        distill(load_recipe("shapes-hybrid", [*options, f"output={tmp_path / 'run'}"]))


def test_what_a_refused_run_advises_can_be_done(tmp_path, conversations):
    """Data of another name, fewer tokens, more bad rows: the same folder goes on."""
    base = [*SMALL, "stages=[1]", "stage_1.steps=8", f"output={tmp_path / 'run'}"]
    with pytest.raises(FileNotFoundError, match=r"mistyped\.jsonl does not exist"):
        distill(load_recipe("shapes-hybrid", [*base, "data=[{file: mistyped.jsonl}]"]))
    assert not (tmp_path / "run" / "seeded").exists()
    data = f"data=[{{file: {conversations}}}]"
    with pytest.raises(ValueError, match="or allow a larger share"):
        distill(load_recipe("shapes-hybrid", [*base, data]))
    assert (tmp_path / "run" / "stage-1" / "checkpoints").is_dir()
    with pytest.raises(ValueError, match="holds a run with another max_tokens;"):  # a checkpoint depends on it
        distill(load_recipe("shapes-hybrid", [*base, data, "bad_share=0.5", "max_tokens=500"]))
    distill(load_recipe("shapes-hybrid", [*base, data, "bad_share=0.5"]))
    assert (tmp_path / "run" / "stage-1" / "model").is_dir()


def test_a_stage_after_those_that_should_have_waited_for_it_is_refused(tmp_path, capsys):
    recipe = load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}"])
    distill(recipe, "seed")
    distill(recipe, "2")
    assert "WARNING: stage 2 starts from the seeded student, without stage 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no finished stage 1 but stage-2, made without it; remove stage-2 to"):
        distill(recipe)
    shutil.rmtree(tmp_path / "run" / "stage-2")
    distill(recipe)
    assert "WARNING" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "stage-3")
    with pytest.raises(ValueError, match=r"has no finished stage 3 but model, made without it; remove model to"):
        distill(recipe)


def test_data_of_a_run_that_goes_on_are_looked_at_before_it_trains(tmp_path, conversations):
    options = [*SMALL, f"output={tmp_path / 'run'}", "strategy=measured", "num_attention=2"]
    options += [f"{key}=[{{file: {conversations}}}]" for key in ("data", "held_out")]
    distill(load_recipe("shapes-hybrid", options), "seed")
    for key in ("data", "held_out"):
        with pytest.raises(FileNotFoundError, match=r"nope.jsonl does not exist"):
            distill(load_recipe("shapes-hybrid", [*options, f"{key}=[{{file: nope.jsonl}}]"]))


def test_the_card_of_a_finished_run_follows_its_recipe(tmp_path, capsys, monkeypatch):
    options = [*SMALL, "stages=[1]", "stage_1.steps=2", "stage_1.decay=0", f"output={tmp_path / 'run'}"]
    distill(load_recipe("shapes-hybrid", options))
    card = tmp_path / "run" / "model" / "README.md"
    before, written = card.read_text(), (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    another = load_recipe("shapes-hybrid", [*options, "evaluate=3", "base_model=someone/teacher", "name=Mine"])

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmmamba.conversion.distillation.run.Run._write_card", killed)
        distill(another)
    assert card.read_text() == before and "questions right" in capsys.readouterr().out
    distill(another)
    text = card.read_text()
    assert "Mine" in text and "base_model: someone/teacher" in text and "3 held-out questions" in text
    assert "questions right" not in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written
    card.write_text(text + "My own words.")
    distill(load_recipe("shapes-hybrid", [*options, "name=Other"]))
    assert card.read_text() == text + "My own words." and "was edited and stays" in capsys.readouterr().out
    # Another model has other scores.
    shutil.rmtree(tmp_path / "run" / "model")
    distill(load_recipe("shapes-hybrid", options))
    assert "held-out questions" not in card.read_text()


def test_a_folder_that_processes_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmmamba.conversion.distillation.folder.gather_object", lambda mine: [*mine, False])
    with pytest.raises(FileNotFoundError, match=r"Not every process sees \S*recipe.yaml, which the first one wrote"):
        distill(load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}"]))


def test_too_many_bad_rows_stop_a_run(tmp_path, conversations):
    options = [
        *SMALL,
        f"data=[{{file: {conversations}}}]",
        "stages=[1]",
        "stage_1.steps=8",
        f"output={tmp_path / 'run'}",
    ]
    with pytest.raises(ValueError, match=r"1 bad rows among .* are more than the 1.00% that is allowed"):
        distill(load_recipe("shapes-hybrid", options))
    assert not (tmp_path / "run" / "stage-1" / "model").exists()


def test_a_measured_placement_keeps_the_costliest_layers(tmp_path, capsys):
    # Two batches of four conversations, of which the device holds two at once.
    options = ["strategy=measured", "num_attention=2", "measure_batches=2"]
    recipe = load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}", *options])
    distill(recipe)
    placement = json.loads((tmp_path / "run" / "results.json").read_text())["placement"]
    costs, chosen = placement["kl_per_token"], placement["attention"]
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "run" / "placed")
    teacher = MmMambaForConditionalGeneration.from_pretrained(TEACHER, dtype=torch.float32).eval()
    trained = load_file(tmp_path / "run" / "stage-2" / "model" / "model.safetensors")
    # Each layer's cost again, from a hybrid of its own and plain logits.
    source = TrainingData(recipe, TEACHER)
    batches = list(source.held_out(4, 2))
    for layer, cost in enumerate(costs):
        config = copy.deepcopy(teacher.config)
        config.text_config.layer_types = ["full_attention"] * 6
        config.text_config.layer_types[layer] = "linear_attention"
        hybrid = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
        own = {name: x for name, x in trained.items() if name.startswith(f"model.layers.{layer}.")}
        hybrid.load_state_dict({name: own.get(name, teacher.state_dict().get(name)) for name in hybrid.state_dict()})
        found = []
        for batch in batches:
            answers = batch["labels"][:, 1:] != -100
            with torch.no_grad():
                p, q = (x(**batch).logits[:, :-1].double().log_softmax(-1)[answers] for x in (teacher, hybrid))
            found.append((p.exp() * (p - q)).sum(-1))
        assert cost == pytest.approx(float(torch.cat(found).mean()), rel=1e-3)
    assert min(costs[i] for i in chosen) >= max(costs[i] for i in range(6) if i not in chosen)
    for layer, kind in enumerate(model.config.text_config.layer_types):
        assert (kind == "full_attention") == (layer in chosen)
        if layer in chosen:
            query = model.model.layers[layer].self_attn.q_proj.weight
            assert torch.equal(query, teacher.model.layers[layer].self_attn.q_proj.weight)
        else:
            name = f"model.layers.{layer}.mamba.conv1d.weight"
            assert torch.equal(model.state_dict()[name], trained[name])
    # A teacher that is held in another dtype than its student.
    student = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "run" / "stage-2" / "model").float().eval()
    assert replacement_kl(teacher.bfloat16(), student, batches) == pytest.approx(costs, rel=0.3)


def test_bf16_with_a_reading_process_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """As recipes are by default, in stage 2."""
    options = [*SMALL, "precision=bf16", "workers=1", "stages=[2]"]
    distill(load_recipe("shapes-hybrid", [*options, f"output={tmp_path / 'whole'}"]))
    stopped_and_gone_on([*options, f"output={tmp_path / 'cut'}"], monkeypatch)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "cut").items())
    exact = load_recipe("shapes-hybrid", [*options, "precision=fp32", f"output={tmp_path / 'exact'}"])
    distill(exact)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "exact").items())


def test_stage_3_with_gradient_checkpointing_and_a_tied_teacher(tmp_path):
    teacher = MmMambaForConditionalGeneration.from_pretrained(TEACHER, dtype=torch.float32)
    teacher.config.text_config.tie_word_embeddings = teacher.config.tie_word_embeddings = True
    teacher.lm_head.weight = teacher.model.embed_tokens.weight
    folder = tmp_path / "tied"
    shutil.copytree(TEACHER, folder)
    (folder / "model.safetensors").unlink()
    teacher.save_pretrained(folder)
    results = []
    for checkpointing in ("true", "false"):
        output = tmp_path / checkpointing
        options = [*SMALL, "stages=[3]", f"teacher={folder}", f"stage_3.gradient_checkpointing={checkpointing}"]
        distill(load_recipe("shapes-hybrid", [*options, f"output={output}"]))
        results.append(weights(output))
    assert all(torch.allclose(results[0][name], tensor, atol=1e-6) for name, tensor in results[1].items())


def test_nothing_is_exported_before_the_last_stage(tmp_path):
    recipe = load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}"])
    for done in ("seed", "1"):
        distill(recipe, done)
        with pytest.raises(ValueError, match=r"stage-3 of .* is not finished, so there is nothing to export yet"):
            distill(recipe, "export")
    # What has not begun may be changed; what has, not.
    another = [*SMALL, f"output={tmp_path / 'run'}", "stage_3.logits_chunk=64", "stage_2.steps=6"]
    distill(load_recipe("shapes-hybrid", another), "seed")
    with pytest.raises(ValueError, match="holds a run with another stage_1;"):
        distill(load_recipe("shapes-hybrid", [*another, "stage_1.learning_rate=1"]), "seed")


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
        (["strategy=measured", "num_attention=6"], "num_attention=6 must lie between 1 and 5"),
        (["strategy=measured", "num_attention=2", "data=[{file: x.jsonl}]"], "needs held_out in the recipe"),
        (["data=[{shapes: train}, {file: x.jsonl}]"], "is more than the picture world"),
        (["data=[{file: x.jsonl}]"], "x.jsonl does not exist"),
        (["held_out=[{fil: x.jsonl}]"], "did you mean file for fil?"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError), match=r"^[^\n]*$") as error:
        distill(load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path / 'run'}", *overrides]))
    assert message in str(error.value)
    assert not (tmp_path / "run" / "seeded").exists()


def test_a_model_of_another_world_is_not_scored_on_the_pictures(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "other")
    config = json.loads((TEACHER / "config.json").read_text())
    config["text_config"]["vocab_size"] = 700
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    message = r"^\S*other was not made for the picture world: it has 700 tokens [^\n]*$"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        distill(load_recipe("shapes-hybrid", [f"teacher={tmp_path / 'other'}", f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no run"):
        distill(load_recipe("shapes-hybrid", [*SMALL, f"output={tmp_path}"]))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
