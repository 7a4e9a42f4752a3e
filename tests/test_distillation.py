"""Losses of the three stages against upstream's, and what each stage may and may not change."""

import copy

import pytest
import torch
from golden_checkpoints import GOLDEN, checkpoint, training_layers
from safetensors.torch import load_file
from tiny_models import tiny_model

from mmmamba.conversion.convert import convert
from mmmamba.conversion.distillation.end_to_end import distillation_loss, kl_sum
from mmmamba.conversion.distillation.layerwise import SCALE, HeldRows, layer_errors, mixers, parameter_groups
from mmmamba.conversion.layouts import from_training_student
from mmmamba.conversion.seeding import seed_state_dict
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


STAGE_FILES = {
    "stage1_at_seed": ["student_seeded.safetensors"],
    "stage1_perturbed": ["student_perturbed.safetensors"],
    "stage2": ["student_perturbed.safetensors", "student_stage2_qkv.safetensors"],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    convert(checkpoint(folder / "src", "hovle_tiny"), folder / "model")
    return MmMambaForConditionalGeneration.from_pretrained(folder / "model").eval().requires_grad_(False)


def upstream_student(teacher, files):
    """The fixture's student in our layout."""
    state, config = seed_state_dict(teacher.state_dict(), teacher.config, attention=())
    student = MmMambaForConditionalGeneration(config).eval()
    student.load_state_dict(state)
    layers = training_layers(*files)
    for index, mixer in mixers(student).items():
        name = f"embedding_model.encoder.{index}" if index < 8 else f"language_model.model.layers.{index - 8}"
        tensors = dict(layers[name])
        values = dict(zip("vkq", mixer.in_proj.weight.split([32, 32, 64, 64, 4])[:3], strict=True))
        tensors = (
            {f"{x}_proj.weight": row for x, row in values.items()} | {"o_proj.weight": mixer.out_proj.weight} | tensors
        )
        mixer.load_state_dict(from_training_student(tensors))
    return student


def batch_of(case):
    return {name: case[f"in.{name}"] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize("stage", STAGE_FILES)
def test_layerwise_losses_are_upstreams(teacher, stage):
    case = load_file(GOLDEN / "seeding" / f"{stage}.safetensors")
    seen = {}
    errors = layer_errors(
        teacher,
        mixers(upstream_student(teacher, STAGE_FILES[stage])),
        batch_of(case),
        observe=lambda layer, heads, target: seen.update({layer: (heads, target)}),
    )
    torch.testing.assert_close(errors, case["per_layer_mse"], rtol=1e-4, atol=0)
    torch.testing.assert_close(SCALE * errors.mean(), case["loss"][0], rtol=1e-4, atol=0)
    for name, layer in (("embedding0", 0), ("llm0", 8)):
        heads, target = (x.transpose(1, 2) for x in seen[layer])
        torch.testing.assert_close(heads, case[f"{name}.y_pred"], rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(target, case[f"{name}.y_true_heads"], rtol=1e-3, atol=5e-4)


def test_stage_3_of_upstreams_student(teacher):
    case = load_file(GOLDEN / "seeding" / "stage3_forward.safetensors")
    inputs = batch_of(load_file(GOLDEN / "seeding" / "stage2.safetensors"))
    student = upstream_student(teacher, STAGE_FILES["stage2"])
    with torch.no_grad():
        logits, truth = student(**inputs).logits, teacher(**inputs).logits
    torch.testing.assert_close(truth, case["teacher_logits"], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(logits, case["student_logits"], rtol=1e-3, atol=3e-3)
    # Logits that differ by 1e-3 move a sum over positions by about that share.
    torch.testing.assert_close(kl_sum(logits, truth), case["loss"].squeeze(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["as_configured_b1", "as_configured_b2", "t2_labels"])
def test_stage_3_loss_and_gradient_are_upstreams(name):
    case = load_file(GOLDEN / "stage3_loss" / "case.safetensors")
    student = case[f"{name}.student_logits"].requires_grad_()
    teacher, labels = case[f"{name}.teacher_logits"], case[f"{name}.labels"]
    temperature, alpha, hard = (2.0, 0.5, 1.0) if name == "t2_labels" else (1.0, 1.0, 0.0)
    kl = alpha * kl_sum(student, teacher, temperature) / len(student)
    torch.testing.assert_close(kl, case[f"{name}.kl"].squeeze(), rtol=1e-5, atol=1e-4)

    # The same through the per-token loss: a mean instead of a sum, its hard part weighted to match.
    tokens = student.shape[1]
    loss = (
        alpha
        * tokens
        * distillation_loss(student, teacher, labels, temperature=temperature, hard_weight=hard / (alpha * tokens))
    )
    torch.testing.assert_close(loss, (case[f"{name}.kl"] + case[f"{name}.ce"]).squeeze(), rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, case[f"{name}.grad_student_logits"], rtol=1e-5, atol=1e-4)


def pair(attention=()):
    teacher = tiny_model("teacher").float()
    state, config = seed_state_dict(teacher.state_dict(), teacher.config, attention)
    student = MmMambaForConditionalGeneration(config)
    student.load_state_dict(state)
    return teacher, student


def padded_batch():
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_layerwise_gradients_are_those_of_all_layers_at_once():
    teacher, student = pair()
    batch = padded_batch()
    layer_errors(teacher, mixers(student), batch, backward=True)
    streamed = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    collected = []
    copied = copy.deepcopy(student)
    copied.zero_grad()
    with torch.enable_grad():
        inputs = {}
        for index, layer in enumerate(teacher.model.layers):
            layer.self_attn.register_forward_pre_hook(
                lambda m, args, kwargs, index=index: inputs.update({index: args[0].detach()}), with_kwargs=True
            )
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args, index=index: inputs.update({-1 - index: args[0].detach()})
            )
        teacher(**batch)
        valid = batch["attention_mask"].bool()
        for index, mixer in mixers(copied).items():
            rows = []
            for row in range(2):  # each row alone, so that padding cannot play a part
                heads = mixer.heads(inputs[index][row : row + 1, valid[row]])
                rows.append(heads.flatten(2)[0] - inputs[-1 - index][row, valid[row]])
            collected.append(torch.cat(rows).square().mean())
    (SCALE * torch.stack(collected).mean()).backward()
    for name, parameter in copied.named_parameters():
        if parameter.grad is None:
            assert name not in streamed
        else:
            torch.testing.assert_close(streamed[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_stage_1_leaves_values_keys_and_queries_exactly_as_they_are():
    teacher, student = pair(attention=(1,))
    learners = mixers(student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    named = [(name, p) for m in learners.values() for name, p in m.named_parameters() if name != "out_proj.weight"]
    optimizer, held = torch.optim.AdamW(parameter_groups(named), lr=1e-2), HeldRows(learners)
    for _ in range(3):
        layer_errors(teacher, learners, padded_batch(), backward=True)
        # Clipping must not count gradients that go nowhere.
        assert all(m.in_proj.weight.grad[: m.splits[0]].abs().max() == 0 for m in learners.values())
        assert all(m.in_proj.weight.grad[m.splits[0] :].abs().max() > 0 for m in learners.values())
        optimizer.step()
        held.put_back()
        optimizer.zero_grad()
    for name, parameter in student.named_parameters():
        if name.endswith("in_proj.weight"):
            rows = learners[0].splits[0]
            assert torch.equal(parameter[:rows], before[name][:rows])
            assert not torch.equal(parameter[rows:], before[name][rows:])
        else:
            trained = ".mamba." in name and "out_proj" not in name
            assert torch.equal(parameter, before[name]) != trained, name


def test_no_weight_decay_on_decays_norms_and_biases():
    _, student = pair()
    decayed, kept = parameter_groups(list(mixers(student)[0].named_parameters()))
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] == 0.05


def test_padding_does_not_count_in_stage_3():
    teacher, student = pair()
    batch = padded_batch()
    with torch.no_grad():
        logits, truth = student(**batch).logits, teacher(**batch).logits
        alone = [kl_sum(logits[row, :length], truth[row, :length]) for row, length in ((0, 12), (1, 7))]
    loss = distillation_loss(logits, truth, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(loss, sum(alone) / 19)


def test_answers_alone_may_count_and_may_be_missing():
    teacher, student = pair()
    batch = padded_batch()
    labels = batch["labels"].clone()
    labels[:, :3], labels[1] = -100, -100
    with torch.no_grad():
        logits, truth = student(**batch).logits, teacher(**batch).logits
    options = {"answers_only": True, "hard_weight": 0.5}
    loss = distillation_loss(logits, truth, labels, batch["attention_mask"], **options)
    hard = torch.nn.functional.cross_entropy(logits[0, 2:-1], labels[0, 3:])
    torch.testing.assert_close(loss, kl_sum(logits[0, 2:-1], truth[0, 2:-1]) / 9 + 0.5 * hard)
    assert distillation_loss(logits, truth, torch.full_like(labels, -100), **options) == 0
    with pytest.raises(ValueError, match=r"answers_only=True and hard_weight=0\.5 need labels"):
        distillation_loss(logits, truth, **options)
