"""Whole runs over text: documents and conversations, a teacher whose folder has a tokenizer only."""

import gc
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from byte_tokenizer import byte_tokenizer
from conversations import turns, write_lines
from safetensors.torch import load_file
from tiny_models import tiny_config

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.distillation import stages
from mmmamba.conversion.distillation.data import open_data, pad
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.folder import RunFolder
from mmmamba.conversion.distillation.on_policy import AnswerWriter
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.distillation.run import distill
from mmmamba.conversion.distillation.trainer import DistillationTrainer
from mmmamba.conversion.llama import text_tokenizer
from mmmamba.conversion.publish import write_model_folder
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


STAGE = {"steps": 4, "learning_rate": 1e-2, "warmup": 1, "decay": 2, "batch_size": 4, "per_device_batch_size": 2}
RECIPE = {
    "precision": "fp32", "dtype": "float32", "save_every": 2, "log_every": 1, "workers": 0, "row_tokens": 16,
    "bad_share": 0.5, "stage_1": STAGE, "stage_2": STAGE, "stage_3": STAGE,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def without_delays():
    """One thread and no GPU, no plots."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage often, and what Transformers has imported takes long to go through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(stages, "plot_losses", lambda *_: None)
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The datasets library, writing nowhere but here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random teacher with a byte-level tokenizer and no image processor."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("teacher", len(tokenizer), vocab_size=len(tokenizer) + 1, eos_token_id=0)
    model = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    write_model_folder(folder, model.config, "tiny")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    """Two documents, one of them not UTF-8."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The quick brown fox says: it is 12 o'clock, and the dog sleeps. " * 6)
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
    return [{"documents": str(tmp_path / "texts" / "*.txt")}]


@pytest.fixture
def conversations(tmp_path):
    lines = [{"conversations": turns(f"Is it {i} o'clock?", f"It is {i}.")} for i in range(4)]
    return [{"file": str(write_lines(tmp_path / "talk.jsonl", lines))}]


@pytest.fixture
def recipe(teacher, tmp_path):
    """From a run's name and the values of keys, dotted for a stage's, to a recipe."""

    def make(name, **changes):
        values = {**RECIPE, "teacher": str(teacher), "output": str(tmp_path / name)}
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return make


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_weights(folder, other):
    """Equal to the last bit."""
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def losses(folder, stage):
    history = json.loads((folder / f"stage-{stage}" / "history.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def stop_and_resume(recipe, stage, monkeypatch):
    """A run that is interrupted in a stage's fourth step and started again; the stage's steps, counted from 0."""
    plain, steps = DistillationTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        step = self.state.global_step
        if f"stage-{stage}" in self.args.output_dir and step not in steps[-1:]:
            steps.append(step)
            if len(steps) == 4:
                raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe)
    distill(recipe)
    return steps


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_over_documents_and_conversations_resumes_to_the_same_weights(
    recipe, tmp_path, texts, conversations, packing, monkeypatch
):
    options = {"data": texts + conversations, "stages": [1, 3], "packing": packing, "stage_3__row_tokens": 32}
    options |= {"stage_3__kl_weight": 0.5, "stage_3__hard_weight": 0.5}
    distill(recipe("whole", **options))
    assert stop_and_resume(recipe("cut", **options), 3, monkeypatch) == [0, 1, 2, 3, 2, 3]
    same_weights(tmp_path / "cut", tmp_path / "whole")
    (line,) = (tmp_path / "whole" / "stage-1" / "bad_rows.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert bad["row"].endswith("b.txt") and bad["reason"] == "it is not UTF-8 text"
    assert (tmp_path / "whole" / "model" / "tokenizer.json").is_file()


def test_rows_of_a_stage_are_as_long_as_it_says(recipe, tmp_path, texts):
    options = {"data": texts, "stages": [1, 2], "stage_2__row_tokens": 40, "stage_1__batch_size": 2}
    distill(recipe("run", **options, stage_2__batch_size=2))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # Of two rows per step at most one is the document's shorter last.
    assert 4 * 2 * 16 - 4 * 15 <= results["stage_1"]["tokens"] <= 4 * 2 * 16
    assert 4 * 2 * 40 - 4 * 39 <= results["stage_2"]["tokens"] <= 4 * 2 * 40


def test_a_length_curriculum_keeps_tokens_per_step_and_resumes(recipe, tmp_path, texts, monkeypatch):
    shutil.rmtree(tmp_path / "texts")  # one long document, whose rows are all full
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("dog " * 2000)
    lengths, plain = [], EndToEndDistiller.forward

    def forward(self, **batch):
        lengths.append(tuple(batch["input_ids"].shape))
        return plain(self, **batch)

    monkeypatch.setattr(EndToEndDistiller, "forward", forward)
    options = {"data": texts, "stages": [3], "stage_3__row_tokens": [8, 16, 32], "stage_3__steps": 5}
    distill(recipe("whole", **options))
    steps = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]  # of two micro-batches each
    assert steps == [[(8, 8)] * 2] * 2 + [[(4, 16)] * 2] * 2 + [[(2, 32)] * 2]
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["stage_3"]["tokens"] == 5 * 4 * 32
    assert stop_and_resume(recipe("cut", **options), 3, monkeypatch) == [0, 1, 2, 3, 2, 3, 4]
    same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_on_the_students_own_answers_resumes_to_the_same_weights(
    recipe, tmp_path, texts, conversations, packing, monkeypatch
):
    options = {"data": texts + conversations, "stages": [3], "packing": packing, "stage_3__on_policy": 0.5}
    options |= {"stage_3__on_policy_tokens": 5, "stage_3__hard_weight": 0.5}
    written, plain = [], AnswerWriter.__call__

    def counting(self, student, batch, step, index):
        made = plain(self, student, batch, step, index)
        written.append((step, index, made is not batch))
        return made

    monkeypatch.setattr(AnswerWriter, "__call__", counting)
    distill(recipe("whole", **options))
    assert len(written) == 4 * 2 and {own for *_, own in written} == {True, False}
    assert stop_and_resume(recipe("cut", **options), 3, monkeypatch) == [0, 1, 2, 3, 2, 3]
    same_weights(tmp_path / "cut", tmp_path / "whole")
    distill(recipe("off", **options | {"stage_3__on_policy": 0}))
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "off")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_text_only_teacher_runs_through_all_stages(recipe, tmp_path, texts, conversations):
    """As `mmmamba convert` makes it of a language model."""
    tokenizer = text_tokenizer(byte_tokenizer())
    config = tiny_config("teacher", vocab_size=len(tokenizer), eos_token_id=0)
    config = MmMambaConfig(text_config=config.text_config, vision_config=None, image_token_id=None)
    torch.manual_seed(0)
    model = MmMambaForConditionalGeneration._from_config(config, dtype=torch.float32)
    folder = tmp_path / "text-only"
    model.save_pretrained(folder)
    write_model_folder(folder, model.config, "text-only", tokenizer)
    lines = [{"image": "a.png", "conversations": turns("What?", "This")}]
    data = [*texts, *conversations, {"file": str(write_lines(tmp_path / "pictures.jsonl", lines))}]
    options = {"teacher": str(folder), "data": data, "stages": [1, 2, 3, 4], "stage_4": STAGE, "bad_share": 1}
    distill(recipe("run", **options, stage_3__on_policy=0.5, stage_3__on_policy_tokens=4))
    found = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert found.config.vision_config is None
    assert type(load_tokenizer(tmp_path / "run" / "model")) is type(tokenizer)
    bad = (tmp_path / "run" / "stage-1" / "bad_rows.jsonl").read_text()
    assert "its folder has no image processor" in bad


def test_own_answers_and_bf16_go_together(recipe, tmp_path, texts):
    options = {"data": texts, "stages": [3], "stage_3__on_policy": 1, "stage_3__on_policy_tokens": 3}
    distill(recipe("run", **options, precision="bf16", stage_3__gradient_checkpointing=True))
    assert all(loss > 0 for loss in losses(tmp_path / "run", 3))


def test_own_answers_and_sharded_weights_are_refused(recipe, texts, monkeypatch):
    prepare = DistillationTrainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=r"^on_policy lets every process write answers of its own, [^\n]*$"):
        distill(recipe("run", data=texts, stages=[3], stage_3__on_policy=0.5))


def test_stage_2_that_aligns_outputs_trains_output_projections_and_resumes(recipe, tmp_path, texts, monkeypatch):
    options = {"data": texts, "stages": [1, 2], "stage_2__align": "output"}
    distill(recipe("whole", **options))
    assert stop_and_resume(recipe("cut", **options), 2, monkeypatch) == [0, 1, 2, 3, 2, 3]
    same_weights(tmp_path / "cut", tmp_path / "whole")
    before, after = (load_file(tmp_path / "whole" / f"stage-{n}" / "model" / "model.safetensors") for n in (1, 2))
    assert all(torch.equal(after[name], before[name]) != (".mamba." in name) for name in after)


def test_a_placement_is_measured_on_documents(recipe, tmp_path, texts):
    options = {"data": texts, "held_out": texts, "strategy": "measured", "num_attention": 2, "measure_batches": 2}
    distill(recipe("run", **options, stages=[2, 3]))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["placement"]["attention"]) == 2


def test_a_student_learns_from_labels_without_loading_a_teacher(recipe, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(stages.Run, "teacher", property(lambda run: pytest.fail("the teacher was loaded")))
    distill(recipe("run", data=texts, stages=[3], stage_3__kl_weight=0, stage_3__hard_weight=1))
    found = losses(tmp_path / "run", 3)
    assert found[-1] < found[0]


def test_stage_4_fine_tunes_on_labels_of_its_own_data(recipe, teacher, tmp_path, texts, conversations, monkeypatch):
    stage_4 = STAGE | {"data": conversations, "per_device_batch_size": 4}
    distill(recipe("run", data=texts, stages=[3]))
    with pytest.raises(ValueError, match="The recipe has no stage_4; add it"):
        distill(recipe("run", data=texts, stages=[3]), "4")
    # Added to a finished run, whose model is that of stage 3.
    options = {"data": texts, "stages": [3, 4], "stage_4": stage_4}
    with pytest.raises(ValueError, match="holds a run with another stages, stage_4;"):
        distill(recipe("run", **options))
    shutil.rmtree(tmp_path / "run" / "model")
    monkeypatch.setattr(stages.Run, "teacher", property(lambda run: pytest.fail("the teacher was loaded")))
    distill(recipe("run", **options))

    # All four conversations are in each step, and the first step's loss is that of stage 3's student.
    rows = open_data(conversations, byte_tokenizer())
    batch = pad([rows[i] for i in range(4)], pad_token_id=0)
    expected = []
    for folder in (tmp_path / "run" / "stage-3" / "model", tmp_path / "run" / "stage-4" / "model"):
        model = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected.append(float(model(**batch).loss))
    found = losses(tmp_path / "run", 4)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and expected[1] < found[-1] < found[0]
    # The whole decoder trains, and nothing else; the finished model is stage 4's.
    before, after = (load_file(tmp_path / "run" / f"stage-{n}" / "model" / "model.safetensors") for n in (3, 4))
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (".layers." in name), name
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "stage 4: 4 steps" in card and "talk.jsonl" in card and "*.txt" in card.replace("\\", "")


def test_stage_4_resumes_to_the_same_weights(recipe, tmp_path, texts, monkeypatch):
    options = {"data": texts, "stages": [4], "stage_4": STAGE | {"gradient_checkpointing": True}}
    distill(recipe("whole", **options))
    assert stop_and_resume(recipe("cut", **options), 4, monkeypatch) == [0, 1, 2, 3, 2, 3]
    same_weights(tmp_path / "cut", tmp_path / "whole")


def test_stage_4_starts_from_the_measured_placement_where_stage_3_is_missing(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    for made in (folder.seeded, folder.stage_model(2), folder.placed):
        made.mkdir(parents=True)
    assert folder.student_before(4, placed=True) == folder.placed
    assert "stage 4 starts from the placement, without stage 3" in capsys.readouterr().out
    folder.stage_model(3).mkdir(parents=True)
    assert folder.student_before(4, placed=True) == folder.stage_model(3)
    assert folder.student_before(3, placed=True) == folder.placed
    assert folder.student_before(2, placed=True) == folder.seeded
    assert folder.begun_stages() == [2, 3]


def test_wrong_data_of_stage_4_are_found_before_anything_trains(recipe, tmp_path, texts):
    for data, words in (([{"fil": "x"}], "did you mean file for fil"), ([{"file": "gone.jsonl"}], "does not exist")):
        with pytest.raises((ValueError, OSError), match=words):
            distill(recipe("run", data=texts, stages=[3, 4], stage_4=STAGE | {"data": data}))
        assert not (tmp_path / "run" / "seeded").exists()


def test_data_without_documents_or_with_pictures_only_are_refused_in_a_sentence(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^documents=\S*gone names no file that ends in [^\n]*$"):
        distill(recipe("run", data=[{"documents": str(tmp_path / "gone")}]))
    lines = [{"image": "a.png", "conversations": turns("What?", "This")}]
    file = write_lines(tmp_path / "pictures.jsonl", lines)
    with pytest.raises(ValueError, match=r"^1 records in a row are bad .* its folder has no image processor"):
        distill(recipe("run", data=[{"file": str(file)}], stages=[1]))
