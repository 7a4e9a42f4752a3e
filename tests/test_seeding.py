"""Seeded students inherit what attention has and start the rest as published."""

import json
import math

import pytest
import torch
from golden_checkpoints import GOLDEN, add_tokenizer, change_weights, checkpoint, training_layers
from safetensors.torch import load_file

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.convert import convert
from mmmamba.conversion.layouts import from_training_student
from mmmamba.conversion.seeding import attention_layers, seed_folder, seed_mixer, seed_state_dict
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


HEADS, HIDDEN, SHARED = 4, 64, 32  # of the fixture


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    convert(checkpoint(folder / "src", "hovle_tiny"), folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ((32, 8, "head-interleaved"), [0, 4, 8, 12, 16, 20, 24, 28]),
        ((32, 8, "tail-interleaved"), [3, 7, 11, 15, 19, 23, 27, 31]),
        ((32, 8, "head-stacked"), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((32, 8, "tail-stacked"), [24, 25, 26, 27, 28, 29, 30, 31]),
        ((12, 5, "head-interleaved"), [0, 2, 4, 7, 9]),
        ((12, 5, "tail-interleaved"), [2, 4, 7, 9, 11]),
        ((12, 0, "head-interleaved"), []),
        ((12, 12, "tail-interleaved"), list(range(12))),
    ],
)
def test_attention_layers_are_placed_as_in_the_paper(arguments, layers):
    assert attention_layers(*arguments) == layers


def test_impossible_placements_are_refused():
    with pytest.raises(ValueError, match="middle-stacked"):
        attention_layers(12, 3, "middle-stacked")
    with pytest.raises(ValueError, match="num_attention=13"):
        attention_layers(12, 13, "head-stacked")


@pytest.mark.parametrize("layer", ["embedding0", "llm0"])
def test_seeding_equals_upstreams_but_for_random_values(layer):
    fixture = load_file(GOLDEN / "seeding" / "seeded_layers.safetensors")
    upstream = {key.removeprefix(f"{layer}.attention."): x for key, x in fixture.items() if ".attention." in key}
    upstream = {key: fixture[f"{layer}.attention.{key}"] for key in upstream if f"{layer}.attention.{key}" in fixture}
    expected = from_training_student(upstream)
    ours = seed_mixer(*(upstream[f"{x}_proj.weight"] for x in "qkvo"), num_heads=HEADS, seed=3)
    assert set(ours) == set(expected)
    gate = slice(2 * SHARED + HIDDEN, 2 * SHARED + 2 * HIDDEN)
    for name in ours:
        assert ours[name].shape == expected[name].shape
        if name == "in_proj.weight":
            drawn, theirs = ours[name][gate].clone(), expected[name][gate].clone()
            ours[name][gate] = expected[name][gate] = 0
        if name != "dt_bias":
            assert torch.equal(ours[name], expected[name]), name

    bound = 2**-2.5 * math.sqrt(6 / (HIDDEN + HIDDEN))
    for draw in (drawn, theirs):  # uniform in ±bound, upstream's draw as well as ours
        assert 0.98 * bound < draw.abs().max() <= bound
        torch.testing.assert_close(draw.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)


def test_step_sizes_are_log_uniform_between_a_thousandth_and_a_tenth():
    q, k = torch.randn(4096, 8), torch.randn(4096, 8)
    bias = seed_mixer(q, k, k, q.T, num_heads=4096)["dt_bias"]
    log_steps = torch.nn.functional.softplus(bias.double()).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-4 < log_steps.min() and log_steps.max() < high + 1e-4
    quantiles = torch.quantile(log_steps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(
        (quantiles - low) / (high - low), torch.tensor([0.1, 0.5, 0.9]).double(), atol=0.03, rtol=0
    )


def test_random_values_depend_on_seed_and_layer_alone(teacher):
    tensors, config = load_file(teacher / "model.safetensors"), MmMambaConfig.from_pretrained(teacher)
    linear, _ = seed_state_dict(tensors, config, [], seed=5)
    hybrid, student = seed_state_dict(tensors, config, [0, 4, 8], seed=5)
    other, _ = seed_state_dict(tensors, config, [0, 4, 8], seed=6)
    name = "model.layers.9.mamba.in_proj.weight"
    assert torch.equal(linear[name], hybrid[name]) and not torch.equal(hybrid[name], other[name])
    assert not torch.equal(linear[name][-68:], linear[name.replace("9", "8")][-68:])
    assert [i for i, kind in enumerate(student.text_config.layer_types) if kind == "full_attention"] == [0, 4, 8]
    assert set(config.text_config.layer_types) == {"full_attention"}
    MmMambaForConditionalGeneration(student).load_state_dict(hybrid)


def test_a_seeded_model_with_upstreams_random_values_is_upstreams_student(teacher, tmp_path):
    """Copying the fixture's own random draws in gives the fixture's per-layer errors (stage 1, at the seed)."""
    seed_folder(teacher, tmp_path / "out")
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    case = load_file(GOLDEN / "seeding" / "stage1_at_seed.safetensors")
    upstream = training_layers("student_seeded.safetensors")
    for name, layer, index in (
        ("embedding0", "embedding_model.encoder.0", 0),
        ("llm0", "language_model.model.layers.0", 8),
    ):
        mixer = model.model.layers[index].mamba
        mixer.in_proj.weight.data[-HIDDEN - HEADS : -HEADS] = upstream[layer]["g_proj.weight"]
        mixer.dt_bias.data = upstream[layer]["dt_bias"].double()
        with torch.no_grad():
            heads = mixer.heads(case[f"{name}.attn_input"].double()).transpose(1, 2)
        torch.testing.assert_close(heads.float(), case[f"{name}.y_pred"], atol=5e-4, rtol=1e-3)
        error = (heads - case[f"{name}.y_true_heads"]).square().mean()
        torch.testing.assert_close(error.item(), case["per_layer_mse"][index].item(), rtol=1e-4, atol=0)


def test_seeding_a_folder_equals_seeding_in_memory(teacher, tmp_path):
    config = seed_folder(teacher, tmp_path / "out", strategy="tail-interleaved", num_attention=3, seed=2)
    stay = attention_layers(12, 3, "tail-interleaved")
    expected, _ = seed_state_dict(
        load_file(teacher / "model.safetensors"), MmMambaConfig.from_pretrained(teacher), stay, seed=2
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["layer_types"] == (
        config.text_config.layer_types
    )


def test_a_student_keeps_its_teachers_tokenizer_and_processor(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    add_tokenizer(source)
    convert(source, tmp_path / "teacher")
    seed_folder(tmp_path / "teacher", tmp_path / "student", [0])
    names = {file.name for file in (tmp_path / "teacher").iterdir()}
    assert {file.name for file in (tmp_path / "student").iterdir()} == names
    for name in names - {"config.json", "model.safetensors", "README.md"}:
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()
    assert "not trained yet" in (tmp_path / "student" / "README.md").read_text()


def test_what_cannot_be_seeded_is_refused_and_leaves_nothing(teacher, tmp_path):
    seed_folder(teacher, tmp_path / "student", [3])
    upstream = checkpoint(tmp_path / "hovle", "hovle_tiny")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in ("config.json", "model.safetensors"):
        (damaged / file).write_bytes((teacher / file).read_bytes())
    name = "model.layers.2.self_attn.q_proj.weight"
    change_weights(damaged, lambda x: x[name].view(-1)[3].fill_(float("nan")))
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    for file in ("config.json", "model.safetensors"):
        (incomplete / file).write_bytes((teacher / file).read_bytes())
    change_weights(incomplete, lambda x: x.pop(name))

    before = sorted(tmp_path.rglob("*"))
    for source, layers, message in (
        (tmp_path / "student", [], "Mamba-2 already"),
        (upstream, [], "mmmamba convert"),
        (damaged, [], f"NaN or infinite values in {name}"),
        (incomplete, [], f"missing: {name}"),
        (teacher, [12], "no layer 12"),
        (tmp_path / "nowhere", [], "no model folder"),
    ):
        with pytest.raises(ValueError, match=message):
            seed_folder(source, tmp_path / "out", layers)
    with pytest.raises(FileExistsError):
        seed_folder(teacher, tmp_path / "student", [])
    assert sorted(tmp_path.rglob("*")) == before
