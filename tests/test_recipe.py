"""Recipes: strict keys and types, overrides, and what each of ours says."""

import dataclasses
import re

import pytest

from mmmamba.conversion.distillation.changes import changed_keys, moved_paths, with_absolute_paths
from mmmamba.conversion.distillation.cost import stage_costs
from mmmamba.conversion.distillation.data.sources import DATASET_KEYS, DOCUMENT_KEYS, FILE_KEYS
from mmmamba.conversion.distillation.recipe import (
    RECIPES,
    AlignmentStage,
    EndToEndStage,
    FineTuningStage,
    Recipe,
    Stage,
    dump_recipe,
    load_recipe,
)
from mmmamba.conversion.distillation.stages import load_teacher_config
from mmmamba.conversion.publish import PACKAGE
from mmmamba.conversion.seeding import attention_layers


def test_every_recipe_of_the_package_loads():
    names = {file.stem for file in RECIPES.glob("*.yaml")}
    assert names == {"shapes-linear", "shapes-hybrid", "hovle-linear", "hovle-hybrid"}
    for name in names:
        assert load_recipe(name).stages == [1, 2, 3]


@pytest.mark.parametrize("name", ["hovle-linear", "hovle-hybrid"])
def test_the_published_schedules(name):
    """arXiv 2502.13145, section 4.1: steps, rates and batches of 8 GPUs."""
    recipe = load_recipe(name)
    published = {1: (1e-3, 128), 2: (5e-4, 128), 3: (5e-5, 64)}
    for number, (rate, batch) in published.items():
        stage = recipe.stage(number)
        assert (stage.steps, stage.learning_rate, stage.batch_size) == (20_000, rate, batch)
        assert stage.warmup == stage.decay == 2000
        assert stage.batch_size % (8 * stage.per_device_batch_size) == 0
    assert (recipe.weight_decay, recipe.clip, recipe.betas) == (0.05, 5.0, [0.9, 0.999])
    if name == "hovle-hybrid":
        assert attention_layers(32, recipe.num_attention, recipe.strategy) == [0, 4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("name", ["8-gpus", "2-nodes", "fsdp2", "deepspeed-zero2"])
def test_launch_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = RECIPES.with_name("accelerate")
    config = load_config_from_file(str(folder / f"{name}.yaml"))
    assert config.num_processes == (16 if name == "2-nodes" else 8)
    assert config.mixed_precision in (None, "no")  # precision is the recipe's


def test_overrides_reach_every_key():
    recipe = load_recipe(
        "shapes-linear", ["stage_3.learning_rate=1e-4", "seed=7", "stages=[1, 3]", "betas=[0.9,0.95]"]
    )
    assert (recipe.stage_3.learning_rate, recipe.seed, recipe.stages, recipe.betas) == (1e-4, 7, [1, 3], [0.9, 0.95])
    assert recipe.stage_3.steps == load_recipe("shapes-linear").stage_3.steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage_3.stepz=3", "no key stage_3.stepz; did you mean stage_3.steps"),
        ("teachr=x", "no key teachr; did you mean teacher"),
        ("stage_1.temperature=2", "no key stage_1.temperature"),
        ("seed=three", "seed='three' in the recipe is of the wrong type; it must be int"),
        ("seed=1.5", "seed=1.5 in the recipe is of the wrong type"),
        ("packing=1", "packing=1 in the recipe is of the wrong type; it must be bool"),
        ("stage_3=5", "stage_3=5 in the recipe is of the wrong type; it must be keys and values"),
        ("stage_1.learning_rate=fast", "must be a finite number"),
        ("stage_1.learning_rate=.nan", "must be a finite number"),
        ("bad_share=5", "bad_share=5.0 must lie between 0 and 1"),
        ("max_tokens=0", "max_tokens=0 must be at least 1"),
        ("evaluate=-5", "evaluate=-5 must be at least 0"),
        ("weight_decay=-3", "weight_decay=-3.0 must be at least 0"),
        ("betas=[1.5, 2]", "betas=[1.5, 2.0] must be two numbers, at least 0 and below 1"),
        ("stage_1={steps: 5, steps: 7}", "the key steps occurs twice"),
        ("stage_1.steps=0", "stage_1: steps=0 must be greater than 0"),
        ("stage_1.warmup=1000", "do not fit into steps=200"),
        ("stage_3.trainable=head", "trainable='head' is unknown; choose one of mixers,"),
        ("stage_3.temperature=0", "temperature=0.0 must be above 0"),
        ("stage_3.divergence=backward", "divergence='backward' is unknown; choose one of forward, reverse"),
        ("stage_3.kl_weight=-1", "stage_3: kl_weight=-1.0 must be at least 0"),
        ("stage_3={steps: 5, learning_rate: 1, kl_weight: 0}", "kl_weight=0 and hard_weight=0 leave nothing to learn"),
        ("stage_3.on_policy=2", "on_policy=2.0 must lie between 0 and 1"),
        ("stage_3.on_policy_tokens=0", "on_policy_tokens=0 be at least 1"),
        (
            "stage_3={steps: 5, learning_rate: 1, kl_weight: 0, on_policy: 1}",
            "needs a teacher to compare answers with",
        ),
        ("stage_1.align=output", "no key stage_1.align"),
        ("stage_2.align=block", "stage_2: align='block' is unknown; choose one of heads, output"),
        ("stages=[4]", "needs stage_4, which is not given"),
        ("stages=[3, 5]", "stages=[3, 5] must be some of 1, 2, 3 and 4"),
        ("stage_4={steps: 5, learning_rate: 1, trainable: all}", "stage_4: trainable='all' is unknown; choose one of"),
        ("stage_4={steps: 5, learning_rate: 1, logits_chunk: 0}", "stage_4: logits_chunk=0 must be at least 1"),
        ("stage_4={steps: 5, learning_rate: 1, temperature: 2}", "no key stage_4.temperature"),
        ("row_tokens=1", "row_tokens=1 must be at least 2"),
        ("stage_1.row_tokens=[64, 64]", "stage_1: row_tokens=[64, 64] must grow, each for at least one of steps=200"),
        ("stage_1.row_tokens=[1, 64]", "stage_1: row_tokens=[1, 64] must be at least 2"),
        ("stage_1.row_tokens=[]", "stage_1: row_tokens=[] must grow"),
        ("stage_1.row_tokens=[64, x]", "stage_1.row_tokens[1]='x' in the recipe is of the wrong type; it must be int"),
        ("stage_1.row_tokens=many", "stage_1.row_tokens='many' in the recipe is of the wrong type; it must be int"),
        ("stage_1.row_tokens=0", "stage_1: row_tokens=0 must be at least 2"),
        ("initialization=random", "choose one of mimic, inherited, scratch"),
        ("num_attention=2", "give both or neither"),
        ("stages=[3, 1]", "in order, each once"),
        ("stage_1=null", "needs stage_1, which is not given"),
        ("output=null", "lacks output"),
        ("steps", "'steps' is no key=value"),
        ("seed=[", "is not YAML"),
    ],
)
def test_wrong_keys_and_values_are_named(override, message):
    with pytest.raises(ValueError) as error:
        load_recipe("shapes-linear", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_or_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe shapes-linar; give a YAML file or one of hovle-hybrid"):
        load_recipe("shapes-linar")
    file = tmp_path / "list.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="no recipe; it must hold keys and values"):
        load_recipe(file)
    file.write_text((RECIPES / "shapes-linear.yaml").read_text() + "seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match=r"^\S*list.yaml is not YAML: the key seed occurs twice$"):
        load_recipe(file)


def test_the_guide_explains_every_key(tmp_path):
    guide = (PACKAGE / "docs" / "distill.md").read_text(encoding="utf-8")
    tables = [
        {key for line in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", line.split("|")[1])}
        for table in re.findall(r"^\| key.*\n(?:\|.*\n)+", guide, re.MULTILINE)
    ]
    stage_kinds = (Stage, AlignmentStage, EndToEndStage, FineTuningStage)
    ours, *stages = ({entry.name for entry in dataclasses.fields(kind)} for kind in (Recipe, *stage_kinds))
    assert tables == [ours, set.union(*stages), {*FILE_KEYS, *DATASET_KEYS, *DOCUMENT_KEYS, "shapes"}]
    (tmp_path / "my-recipe.yaml").write_text(re.search(r"```yaml\n(# my-recipe.yaml.*?)```", guide, re.DOTALL)[1])
    assert load_recipe(tmp_path / "my-recipe.yaml").strategy == "measured"


def test_a_recipes_cost_counts_what_each_stage_trains():
    recipes = [load_recipe("shapes-hybrid", [f"strategy={name}"]) for name in ("head-stacked", "measured")]
    fixed, measured = (
        {cost.stage: cost for cost in stage_costs(one, load_teacher_config(one), 300)} for one in recipes
    )
    assert list(fixed) == [1, 2, 3] and list(measured) == [1, 2, "place", 3]
    assert fixed[3] == measured[3]  # two layers attend
    # Four layers of six train in stages 1 and 2, or all of them.
    teacher = stage_costs(
        load_recipe("shapes-linear", ["attention_layers=[0, 1, 2, 3, 4, 5]"]), load_teacher_config(recipes[0]), 300
    )
    for number in (1, 2):
        alone = teacher[number - 1].operations
        assert (measured[number].operations - alone) * 4 == pytest.approx((fixed[number].operations - alone) * 6)
    assert measured["place"].tokens == 4 * 32 * 300


def test_training_output_projections_in_stage_2_costs_three_products():
    heads, output = (load_recipe("shapes-linear", [f"stage_2.align={align}"]) for align in ("heads", "output"))
    config = load_teacher_config(heads)
    found = [stage_costs(recipe, config, 300) for recipe in (heads, output)]
    text, tokens = config.text_config, found[0][1].tokens
    product = 2 * text.num_attention_heads * text.head_dim * text.hidden_size * text.num_hidden_layers
    assert found[1][1].operations - found[0][1].operations == pytest.approx(3 * tokens * product)
    assert found[1][0] == found[0][0] and found[1][2] == found[0][2]


def test_a_stage_without_teacher_costs_less_by_that_teacher():
    labels = ["stage_3.kl_weight=0", "stage_3.hard_weight=1"]
    fine_tuning = "stage_4={steps: 2500, learning_rate: 1e-3}"  # as many steps of as many conversations
    with_teacher, without = (
        load_recipe("shapes-hybrid", more) for more in ([], [*labels, fine_tuning, "stages=[3, 4]"])
    )
    config = load_teacher_config(with_teacher)
    *_, whole = stage_costs(with_teacher, config, 300)
    third, fourth = stage_costs(without, config, 300)
    assert third.operations == fourth.operations and third.tokens == fourth.tokens == whole.tokens
    # The teacher's forward is at least two operations per parameter of its layers and head, and token.
    assert whole.operations - third.operations > 2 * whole.tokens * config.text_config.vocab_size * 128


def test_a_written_recipe_is_the_same_recipe(tmp_path):
    recipe = load_recipe("shapes-hybrid", ["stage_2.steps=500"])
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and changed_keys(again, recipe) == []
    changed = load_recipe("shapes-hybrid", ["output=x", "seed=3", "stage_3.learning_rate=1"])
    assert changed_keys(recipe, changed) == ["seed", "stage_2.steps", "stage_3.learning_rate"]
    assert changed_keys(recipe, changed, ignore=["stage_2"]) == ["seed", "stage_3.learning_rate"]


def test_what_moves_memory_against_time_may_always_change():
    old = load_recipe("shapes-hybrid")
    moved = ["workers=3", "attn_implementation=sdpa", "stage_3.logits_chunk=64", "stage_3.gradient_checkpointing=true"]
    moved += [f"stage_{number}.per_device_batch_size=4" for number in (1, 2, 3)]
    assert changed_keys(old, load_recipe("shapes-hybrid", moved)) == []
    # The student's own answers are drawn by micro-batch.
    old = load_recipe("shapes-hybrid", ["stage_3.on_policy=0.5"])
    changed = load_recipe("shapes-hybrid", [*moved, "stage_3.on_policy=0.5"])
    assert changed_keys(old, changed) == ["stage_3.per_device_batch_size"]


def test_paths_are_compared_by_where_they_lead(tmp_path, monkeypatch):
    for name in ("teacher", "data", "data/images"):
        (tmp_path / name).mkdir()
    for name in ("train.jsonl", "other.jsonl", "held.jsonl"):
        (tmp_path / "data" / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)

    def recipe(teacher="teacher", file="data/train.jsonl", root="data/images", held="data/held.jsonl", repeat=1):
        return load_recipe(
            "shapes-linear",
            [
                f"teacher={teacher}",
                f"data=[{{file: {file}, root: {root}, repeat: {repeat}}}, {{dataset: a/b, data_files: x.json}}]",
                f"held_out=[{{dataset: json, data_files: [{held}, 'https://x/y.json']}}]",
            ],
        )

    recorded = with_absolute_paths(recipe())
    assert recorded.data[1]["data_files"] == "x.json"  # a file of a repository
    assert recorded.held_out[0]["data_files"] == [str(tmp_path / "data" / "held.jsonl"), "https://x/y.json"]
    monkeypatch.chdir(tmp_path / "data")
    same = recipe("../teacher", "./train.jsonl", tmp_path / "data" / "images", "held.jsonl")
    assert changed_keys(recorded, same) == []
    assert changed_keys(recorded, recipe("images", "train.jsonl", "images", "held.jsonl")) == ["teacher"]
    assert changed_keys(recorded, recipe("../teacher", "other.jsonl", "images", "held.jsonl")) == ["data"]
    assert changed_keys(recorded, recipe("../teacher", "train.jsonl", "images", "held.jsonl", 2)) == ["data"]
    assert changed_keys(recorded, recipe("../teacher", "train.jsonl", "images", "train.jsonl")) == ["held_out"]
    # What was moved is not called another file, but it is named.
    assert moved_paths(recorded, same) == {}
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "moved.jsonl")
    moved = recipe("../teacher", "../moved.jsonl", "images", "held.jsonl")
    assert changed_keys(recorded, moved) == []
    assert moved_paths(recorded, moved) == {str(tmp_path / "data" / "train.jsonl"): str(tmp_path / "moved.jsonl")}
