"""Losses of the three stages against upstream's, and what each stage may and may not change."""

import copy

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from golden_checkpoints import GOLDEN, checkpoint, training_layers
from safetensors.torch import load_file
from tiny_models import enable_checkpointing, tiny_model
from torch.distributed.fsdp import fully_shard

from mmmamba.conversion.convert import convert
from mmmamba.conversion.distillation.data import pack, pad
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.layerwise import LOSS_SCALE, LayerwiseDistiller, mamba_mixers
from mmmamba.conversion.distillation.losses import count_tokens, distillation_loss, kl_sum
from mmmamba.conversion.distillation.trainer import repeating_sampler
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
    for index, mixer in mamba_mixers(student).items():
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
    distiller = LayerwiseDistiller(teacher, upstream_student(teacher, STAGE_FILES[stage]), 2)
    batch = batch_of(case)
    with torch.no_grad():
        errors = distiller.errors(batch, observe=lambda layer, *pair: seen.update({layer: pair}))
        torch.testing.assert_close(distiller(**batch), case["loss"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(errors, case["per_layer_mse"], rtol=1e-4, atol=0)
    for name, layer in (("embedding0", 0), ("llm0", 8)):
        heads, target = (x.transpose(1, 2) for x in seen[layer])
        torch.testing.assert_close(heads, case[f"{name}.y_pred"], rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(target, case[f"{name}.y_true_heads"], rtol=1e-3, atol=5e-4)


def test_stage_3_logits_and_loss_of_upstreams_student_are_upstreams(teacher):
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

    # The same through the per-token loss in chunks: its two means weighted to match upstream's sum and mean.
    tokens, head = student.shape[1], torch.nn.Identity()
    batch = {"input_ids": labels, "labels": labels}
    options = {"temperature": temperature, "hard_weight": hard / (alpha * tokens), "chunk_size": 5}
    loss = alpha * tokens * distillation_loss(student, teacher, head, head, batch, **options)
    torch.testing.assert_close(loss, (case[f"{name}.kl"] + case[f"{name}.ce"]).squeeze(), rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, case[f"{name}.grad_student_logits"], rtol=1e-5, atol=1e-4)


def pair(attention=(), dtype=torch.float64):
    """A random teacher and its seeded student, whose mixers then get random values everywhere."""
    teacher = tiny_model("teacher").to(dtype)
    state, config = seed_state_dict(teacher.state_dict(), teacher.config, attention)
    student = MmMambaForConditionalGeneration(config).to(dtype)
    student.load_state_dict(state)
    torch.manual_seed(1)
    for mixer in mamba_mixers(student).values():
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return teacher, student


def rows(lengths=(12, 7, 1, 20)):
    """Conversations without pictures, their last half the answer."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(3, 80, (length,), generator=generator)
        labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
        made.append({"input_ids": ids, "labels": labels, "pixel_values": torch.empty(0, 3, 16, 16)})
    return made


def gradients(distiller, batch, totals=None):
    distiller.zero_grad()
    distiller(**batch, num_items_in_batch=totals).backward()
    state = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    return distiller.student_tensors(state)


def true_layerwise_gradients(teacher, student, one_by_one, align="heads"):
    """By autograd over all layers at once, every conversation alone."""
    inputs, hooks = {}, []
    for index, layer in enumerate(teacher.model.layers):

        def remember(module, args, kwargs, index=index):
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        def target(module, args, output, index=index):
            inputs[-1 - index] = args[0] if align == "heads" else output

        hooks.append(layer.self_attn.register_forward_pre_hook(remember, with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_hook(target))
    squares, count = {index: 0.0 for index in mamba_mixers(student)}, 0
    for ids in one_by_one:
        with torch.no_grad():
            teacher(input_ids=ids[None])
        count += len(ids)
        for index, mixer in mamba_mixers(student).items():
            found = mixer.heads(inputs[index].clone()).flatten(2)
            found = found if align == "heads" else found @ mixer.out_proj.weight.T
            squares[index] = squares[index] + (found - inputs[-1 - index]).square().mean(2).sum()
    for hook in hooks:
        hook.remove()
    student.requires_grad_(True)
    student.zero_grad()
    (LOSS_SCALE * sum(squares.values()) / len(squares) / count).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("align", ["heads", "output"])
@pytest.mark.parametrize("collate", [pad, pack])
def test_layerwise_gradients_are_those_of_all_layers_at_once(collate, align):
    """Streaming, padding and packing change nothing. Output projections train if their outputs are compared."""
    teacher, student = pair(attention=(1,))
    ids = [row["input_ids"] for row in rows()]
    expected = true_layerwise_gradients(teacher, copy.deepcopy(student), ids, align)
    found = gradients(LayerwiseDistiller(teacher, student, 2, align=align), collate(rows(), pad_token_id=2))
    assert set(found) == {name for name in expected if "out_proj" not in name or align == "output"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_stage_1_leaves_values_keys_and_queries_exactly_as_they_are():
    teacher, student = pair(attention=(1,))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    distiller = LayerwiseDistiller(teacher, student, 1)
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        distiller(**pad(rows(), pad_token_id=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = before | distiller.student_tensors({name: p.detach() for name, p in distiller.state_dict().items()})
    assert set(after) == set(before)
    for name, tensor in after.items():
        if name.endswith("in_proj.weight"):
            held = mamba_mixers(student)[0].splits[0]
            assert torch.equal(tensor[:held], before[name][:held])
            assert not torch.equal(tensor[held:], before[name][held:])
        else:
            trained = ".mamba." in name and "out_proj" not in name
            assert torch.equal(tensor, before[name]) != trained, name


def test_include_padding_gives_upstreams_mean_over_padding():
    teacher, student = pair()
    batch = pad(rows((9, 4)), pad_token_id=2)
    everything = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    with torch.no_grad():
        unmasked = LayerwiseDistiller(teacher, student, 2, include_padding=True)(**batch)
        expected = LayerwiseDistiller(teacher, student, 2)(**everything)
        masked = LayerwiseDistiller(teacher, student, 2)(**batch)
    assert not torch.isclose(unmasked, masked, rtol=1e-2)
    torch.testing.assert_close(unmasked, expected)


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("collate", [pad, pack])
def test_stage_3_in_chunks_is_the_plain_loss_of_each_conversation_alone(collate, answers_only):
    teacher, student = pair(attention=(1,))
    options = {"hard_weight": 0.5, "answers_only": answers_only, "temperature": 2.0}
    distiller = EndToEndDistiller(teacher, student, chunk_size=7, **options)
    found = gradients(distiller, collate(rows(), pad_token_id=2))

    soft = hard = positions = answers = 0
    student.zero_grad()
    for row in rows():
        ids, targets = row["input_ids"], row["labels"][1:]
        logits, truth = student(ids[None]).logits[0], teacher(ids[None]).logits[0]
        counts = torch.cat([targets != -100, torch.tensor([False])]) if answers_only else torch.ones(len(ids)) > 0
        soft, positions = soft + kl_sum(logits[counts], truth[counts], 2.0), positions + counts.sum()
        if len(targets):
            hard = hard + torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
        answers = answers + (targets != -100).sum()
    expected = soft / positions + 0.5 * hard / answers
    expected.backward()
    torch.testing.assert_close(distiller(**collate(rows(), pad_token_id=2)), expected, check_dtype=False)
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert set(found) == names and all(".mamba." in name and "out_proj" not in name for name in names)
    for name, parameter in student.named_parameters():
        if name in names:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9)


def test_reverse_divergence_is_that_of_the_student_from_the_teacher():
    """arXiv 2306.08543, eq. 1: the student's expectation of log student - log teacher, in plain fp64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 13).double().requires_grad_(), 3 * torch.randn(2, 9, 13).double()
    batch = {"input_ids": torch.zeros(2, 9, dtype=torch.long), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    head, options = torch.nn.Identity(), {"divergence": "reverse", "temperature": 1.7, "chunk_size": 4}

    def plain(student):
        total = 0.0
        for q, p, valid in zip(
            student.flatten(0, 1), teacher.flatten(0, 1), batch["attention_mask"].flatten(), strict=True
        ):
            q, p = ((x / 1.7).exp() / (x / 1.7).exp().sum() for x in (q, p))
            total = total + valid * (q * (q.log() - p.log())).sum() * 1.7**2
        return total / 14

    def ours(student):
        return distillation_loss(student, teacher, head, head, batch, **options)

    torch.testing.assert_close(ours(student), plain(student), rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(loss(student), student)[0] for loss in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: kl_sum(x, teacher, 1.7, "reverse"), student)
    assert not torch.isclose(ours(student), distillation_loss(student, teacher, head, head, batch, temperature=1.7))
    # In half precision it is computed in fp32.
    half, wide = (kl_sum(student.to(x), teacher.to(x), 1.7, "reverse") for x in (torch.bfloat16, torch.float32))
    assert half.dtype == torch.float32 and torch.isclose(half, wide, rtol=0.02)


@pytest.mark.parametrize("kl_weight", [0.0, 0.25])
def test_stage_3_weighs_both_losses_and_learns_from_labels_without_a_teacher(kl_weight):
    teacher, student = pair(attention=(1,))
    batch = pad(rows(), pad_token_id=2)
    with torch.no_grad():
        logits, truth = student(**batch).logits, teacher(**batch).logits
    valid, targets = batch["attention_mask"].bool(), batch["labels"][:, 1:]
    p, q = truth[valid].log_softmax(-1), logits[valid].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    hard = -logits[:, :-1][targets != -100].log_softmax(-1).gather(1, targets[targets != -100][:, None]).mean()
    if not kl_weight:
        teacher.model.forward = None  # must not run, even if it is there
    for model in [teacher] if kl_weight else [teacher, None]:
        distiller = EndToEndDistiller(model, student, kl_weight=kl_weight, hard_weight=0.5, chunk_size=7)
        torch.testing.assert_close(distiller(**batch), kl_weight * kl + 0.5 * hard)
        assert all(gradient.abs().max() > 0 for gradient in gradients(distiller, batch).values())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_is_the_same_however_its_conversations_are_split(stage):
    teacher, student = pair()
    make = EndToEndDistiller if stage == 3 else LayerwiseDistiller
    distiller = make(teacher, student, *([] if stage == 3 else [1]))
    whole = gradients(distiller, pad(rows(), pad_token_id=2))
    parts = [pad(rows()[i : i + 2], pad_token_id=2) for i in (0, 2)]
    totals = sum(count_tokens(part) for part in parts)
    shares = [gradients(distiller, part, totals) for part in parts]
    for name, gradient in whole.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], gradient, rtol=1e-7, atol=1e-9)


def test_stage_3_trains_what_trainable_says():
    teacher, student = pair(attention=(1,))

    def trained(trainable):
        EndToEndDistiller(teacher, student, trainable)
        return {name for name, p in student.named_parameters() if p.requires_grad}

    mixing = trained("mixers")
    assert {"model.layers.0.mamba.A_log", "model.layers.0.mamba.dt_bias"} < mixing
    assert trained("mixers+o_proj") - mixing == {f"model.layers.{i}.mamba.out_proj.weight" for i in (0, 2, 3)}
    assert trained("decoder") == {name for name, _ in student.named_parameters() if ".layers." in name}


def test_only_one_layers_activations_are_in_memory():
    """What autograd has saved while the teacher runs does not grow with depth."""
    teacher, student = pair()
    batch = pad(rows((60,)), pad_token_id=2)
    saved, peak = set(), 0

    def pack_hook(tensor):
        nonlocal peak
        saved.add(id(tensor))
        peak = max(peak, len(saved))
        return _SavedTensor(tensor, saved)

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda one: one.tensor):
        for layers in (1, 4):
            peak = 0
            distiller = LayerwiseDistiller(teacher, student, 2)
            for index in list(distiller.mixers)[layers:]:
                del distiller.mixers[index]
            distiller(**batch).backward()
            if layers == 1:
                alone = peak
    # Four layers' gradients are there in the end, one layer's activations at a time.
    assert 0 < alone and peak < 1.5 * alone


class _SavedTensor:
    """Notes when autograd frees a saved tensor."""

    def __init__(self, tensor, saved):
        self.tensor, self.saved, self.key = tensor, saved, id(tensor)

    def __del__(self):
        self.saved.discard(self.key)


def test_logits_of_all_positions_never_exist_at_once():
    class Head(torch.nn.Linear):
        most = 0

        def forward(self, x):
            Head.most = max(Head.most, x.shape[:-1].numel())
            return super().forward(x)

    head = Head(8, 50, bias=False).requires_grad_(False)
    rows = torch.randn(2, 40, 8, requires_grad=True)
    batch = {"input_ids": torch.zeros(2, 40, dtype=torch.long)}
    distillation_loss(rows, torch.randn(2, 40, 8), head, head, batch, chunk_size=7).backward()
    assert Head.most == 7 and rows.grad.abs().min() > 0


def test_labels_may_be_missing_where_nothing_needs_them():
    teacher, student = pair()
    batch = pad(rows(), pad_token_id=2)
    del batch["labels"]
    assert EndToEndDistiller(teacher, student)(**batch) > 0
    with pytest.raises(ValueError, match=r"answers_only=True and hard_weight=0\.5 need labels"):
        EndToEndDistiller(teacher, student, answers_only=True, hard_weight=0.5)(**batch)


def test_a_batch_in_which_nothing_counts_trains_nothing():
    teacher, student = pair()
    batch = pad(rows(), pad_token_id=2)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    distiller = EndToEndDistiller(teacher, student, answers_only=True)
    found = gradients(distiller, batch)
    assert found and all(gradient.abs().max() == 0 for gradient in found.values())


def distiller_of(stage):
    """A distiller of each stage; the same parameters each time."""
    teacher, student = pair(attention=(1,), dtype=torch.float32)
    student.train()
    return (
        EndToEndDistiller(teacher, student, "decoder") if stage == 3 else LayerwiseDistiller(teacher, student, stage)
    )


def compare_sharded_gradients(stage):
    """On each of two ranks: the gradients of a sharded distiller are those of a whole one on all conversations."""
    whole = distiller_of(stage)
    whole(**pad(rows(), 2)).backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}

    sharded = distiller_of(stage)
    if stage == 3:  # one unit per decoder layer, as `_no_split_modules` says
        enable_checkpointing(sharded.student)
        for layer in sharded.student.model.layers:
            fully_shard(layer)
    fully_shard(sharded)
    batches = [pad(rows()[i : i + 2], 2) for i in (0, 2)]
    totals = sum(count_tokens(batch) for batch in batches)
    # FSDP averages gradients over two processes, of losses that are parts of a sum: hence the factor.
    (2 * sharded(**batches[dist.get_rank()], num_items_in_batch=totals)).backward()
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-9)
        assert error < 1e-4, (stage, name, float(error))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_parameters_get_the_gradients_of_one_process(stage, tmp_path, monkeypatch):
    """FSDP2 over two processes, in stage 3 with gradient checkpointing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_ranks(compare_sharded_gradients, tmp_path, stage)


def test_every_epoch_reads_every_row_in_another_order():
    rows = list(range(7))
    read = list(repeating_sampler(rows, 17, seed=3))
    assert sorted(read[:7]) == sorted(read[7:14]) == rows and len(read) == 17
    assert read[:7] != read[7:14] and read == list(repeating_sampler(rows, 17, seed=3))
    assert read != list(repeating_sampler(rows, 17, seed=4))
