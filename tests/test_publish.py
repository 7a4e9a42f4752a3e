"""A model's card says where it comes from, in words and in metadata that the Hub understands."""

import re

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard
from tiny_models import tiny_config

from mmmamba.conversion.publish import Provenance, model_card, write_model_folder


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


def test_a_card_is_read_back_as_it_was_meant():
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
def test_a_card_of_little_says_no_more_than_is_known(kind, words):
    text = model_card("model", tiny_config(kind), origin="Made by hand.")
    assert words in text and "\nMade by hand.\n" in text
    assert "##" not in text and "None" not in text
    values = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "model-index"} & set(values)
    assert ("mamba2" in values["tags"]) == (kind == "linear")


def test_old_arguments_give_what_they_gave():
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


def test_text_is_left_readable():
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


def test_a_folder_gets_the_card(tmp_path):
    config = tiny_config("hybrid")
    write_model_folder(tmp_path, config, "my-hybrid", provenance=FULL)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card("my-hybrid", config, provenance=FULL)
