"""A model's card says where it comes from, for people and for the Hub; a folder appears complete or not at all."""

import os
import re

import numpy as np
import pytest
from forked import kill_this_process, run_killed
from huggingface_hub import EvalResult, ModelCard
from tiny_models import tiny_config

from mmmamba.conversion.publish import (
    Provenance,
    model_card,
    remove_partial_folders,
    whole_folder,
    write_model_folder,
)


def result(value=0.986, **changes):
    values = {
        "task_type": "image-text-to-text",
        "dataset_type": "me/pictures",
        "dataset_name": "Pictures",
        "dataset_split": "test",
        "metric_type": "exact_match",
        "metric_value": value,
    }
    return EvalResult(**values | changes)


FULL = Provenance(
    base_model="OpenGVLab/HoVLE",
    origin="Seeded from my-teacher and distilled from it.",
    datasets=["liuhaotian/LLaVA-Instruct-150K", "runs/private/talk.jsonl"],
    files=["somewhere/else/notes.parquet"],
    results=[result(), result(0.5, metric_type="anls", metric_name="ANLS", dataset_type="me/b", dataset_name="B")],
    training="stage 1: 20,000 steps, 1,310,720,000 tokens; stage 2: 50,000 steps, 3,276,800,000 tokens",
    command="mmmamba distill my-recipe.yaml stage_1.steps=20000",
)


def test_a_cards_metadata_and_text_say_what_was_given():
    text = model_card("my-hybrid", tiny_config("hybrid"), provenance=FULL)
    data = ModelCard(text).data
    assert data.base_model == "OpenGVLab/HoVLE" and data["base_model_relation"] == "finetune"
    assert data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert data.model_name == "my-hybrid" and data.eval_results == FULL.results
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-text-to-text")
    assert set(data.tags) == {"mmmamba", "multimodal", "custom_code", "mamba2"}

    words = " ".join(text.split())
    assert "softmax attention in layer 1 and Mamba-2 in the other 3" in words
    assert FULL.origin in words and "Stage 1: 20,000 steps, 1,310,720,000 tokens; stage 2" in words
    assert "[OpenGVLab/HoVLE](https://huggingface.co/OpenGVLab/HoVLE)" in words
    assert "(https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K)" in words
    assert "not on the Hub: talk.jsonl, notes.parquet." in words
    assert "private" not in text and "somewhere" not in text, "folders of this machine are nobody's business"
    assert f"```bash\n{FULL.command}\n```" in text
    assert "| image-text-to-text | Pictures test | exact_match | 0.986 |" in text
    assert "| image-text-to-text | B test | ANLS | 0.5 |" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [("linear", "all of them Mamba-2, none attention"), ("teacher", "all of them softmax attention")],
)
def test_a_card_leaves_out_what_is_not_known(kind, words):
    text = model_card("model", tiny_config(kind), origin="Made by hand.")
    assert words in text and "\nMade by hand.\n" in text
    assert "##" not in text and "None" not in text
    values = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "model-index"} & set(values)
    assert ("mamba2" in values["tags"]) == (kind == "linear")


def test_without_a_provenance_base_model_and_origin_are_arguments():
    text = model_card("model", tiny_config("teacher"), base_model="OpenGVLab/HoVLE", origin="Converted.")
    values = ModelCard(text).data.to_dict()
    assert values["base_model"] == "OpenGVLab/HoVLE" and "base_model_relation" not in values


HOSTILE = "a\n---\nlicense: gpl\n# <b>x</b> | `y` *z* _u_ [l](m) {braces} \\ 'q' \"p\": {0}"


def test_nothing_that_a_user_writes_breaks_a_card(tmp_path):
    hostile = Provenance(
        base_model=HOSTILE,
        origin=HOSTILE,
        datasets=[HOSTILE, "me/fine", str(tmp_path)],
        files=[HOSTILE],
        results=[result(np.float64(0.25), dataset_name=HOSTILE, task_name=HOSTILE, metric_name=HOSTILE)],
        training=HOSTILE,
        command="echo '```'\n---",
    )
    text = model_card(HOSTILE, tiny_config("hybrid"), provenance=hostile)
    card = ModelCard(text)
    values = card.data.to_dict()
    assert values["license"] == "mit" and values["datasets"] == ["me/fine"] and "base_model" not in values
    (back,) = card.data.eval_results
    assert (back.dataset_name, back.task_name, back.metric_name) == (HOSTILE,) * 3
    assert back.metric_value == 0.25 and type(back.metric_value) is float
    assert card.data.model_name.split() == HOSTILE.split()

    body = card.text
    assert re.findall(r"(?<!\\)[<>]", re.sub(r"```python.*?```", "", body, flags=re.DOTALL)) == []
    assert "\n---\nlicense" not in body
    (row,) = [line for line in body.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5, "four cells"
    assert "````bash\necho '```'\n---\n````" in body
    code = body.split("```python\n")[1].split("```")[0]
    names = {}
    exec(next(line for line in code.splitlines() if line.startswith("path = ")), names)
    assert names["path"] == HOSTILE


def test_escaping_leaves_text_readable():
    origin = "1. See https://huggingface.co/me/my_model_name - it's 3.5x (a_b) smaller, 50%!"
    text = model_card("my_model-1.0", tiny_config("linear"), provenance=Provenance(origin=origin))
    assert "# my_model-1.0\n" in text and 'path = "my_model-1.0"' in text
    assert origin.replace("1.", "1\\.", 1) in text


def test_a_dataset_that_is_a_folder_here_is_not_taken_for_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "talk").mkdir(parents=True)
    text = model_card("model", tiny_config("linear"), provenance=Provenance(datasets=["me/talk", "me/other"]))
    assert ModelCard(text).data.datasets == ["me/other"] and "not on the Hub: talk." in text


def test_a_relation_that_the_hub_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"base_model_relation='distilled'.*finetune"):
        Provenance(base_model="a/b", base_model_relation="distilled")


def test_a_folder_gets_the_card_unless_it_has_one(tmp_path):
    config = tiny_config("hybrid")
    write_model_folder(tmp_path, config, "my-hybrid", provenance=FULL)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card("my-hybrid", config, provenance=FULL)
    (tmp_path / "README.md").write_text("Mine.")
    write_model_folder(tmp_path, config, "my-hybrid", provenance=FULL)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "Mine."


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            assert not (tmp_path / "model").exists()
            raise error
        assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with (
        pytest.raises(FileExistsError, match="model exists; name a folder that does not"),
        whole_folder(tmp_path / "model"),
    ):
        pass


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path):
    message = "model was made by another process meanwhile; it stays"
    with pytest.raises(FileExistsError, match=message), whole_folder(tmp_path / "model"):
        with whole_folder(tmp_path / "model") as other:
            (other / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


def fill_until_killed(destination, pids):
    pids.write_text(str(os.getpid()))
    with whole_folder(destination) as folder:
        (folder / "config.json").write_text("{}")
        kill_this_process()


def test_what_a_killed_process_leaves_blocks_no_later_one(tmp_path, monkeypatch):
    """Not even one with the same process id, as in a container that is started again."""
    run_killed(fill_until_killed, tmp_path / "models" / "model", tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    assert [path.name.split("-")[0] for path in (tmp_path / "models").iterdir()] == [".model.unfinished"]
    monkeypatch.setattr(os, "getpid", lambda: pid)
    with whole_folder(tmp_path / "models" / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "models" / "model").is_dir()
    remove_partial_folders(tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model"]
