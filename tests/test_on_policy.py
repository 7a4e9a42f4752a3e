"""Stage 3 on answers that the student writes itself: which they are, and what the loss makes of them."""

from functools import partial

import pytest
import torch
from test_distillation import pair, rows
from tiny_models import IMAGE_TOKEN, TILE_TOKENS, tiny_model, token_ids

from mmmamba.conversion.distillation.data import pack, pad
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.losses import count_tokens
from mmmamba.conversion.distillation.on_policy import AnswerWriter, cut_to_prompt, split_rows


END = 7


def writer(collate=pad, **changes):
    options = {
        "share": 1.0,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "end_tokens": {END},
        "pad_token_id": 2,
        "seed": 5,
    }
    return AnswerWriter(**options | changes, collate=partial(collate, pad_token_id=2))


def documents(lengths=(12, 7, 20)):
    return [row | {"labels": row["input_ids"].clone()} for row in rows(lengths)]


def with_pictures():
    """A picture in the first question, and another one in the second; and a conversation without pictures."""
    ids = token_ids(3, "tile", 4, "tile", 5, seed=3)
    labels = torch.full_like(ids, -100)
    labels[9:11], labels[-2:] = ids[9:11], ids[-2:]
    tiles = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    plain = rows((9,))[0]
    return [{"input_ids": ids, "labels": labels, "pixel_values": tiles}, plain]


def greedy_answer(model, prompt, **inputs):
    """Token by token, the whole sequence read anew each time."""
    ids = prompt.tolist()
    for _ in range(6):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, **inputs).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


CASES = {"conversations": (rows((12, 7, 20)), [6, 3, 10]), "documents": (documents(), [6, 3, 10])}


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("collate", [pad, pack])
@pytest.mark.parametrize(("given", "prompt_lengths"), CASES.values(), ids=CASES)
def test_greedy_answers_are_what_the_student_would_say(given, prompt_lengths, collate, kind):
    student = tiny_model(kind)
    written = writer(collate)(student, collate(given, pad_token_id=2), step=0, index=0)
    assert (written["labels"] == -100).all()  # nothing says what is right there
    made = split_rows(written | {"labels": written["answer_mask"].long()}, student.config)
    assert len(made) == len(given)
    for row, source, length in zip(made, given, prompt_lengths, strict=True):
        prompt = source["input_ids"][:length]
        assert row["input_ids"].tolist() == prompt.tolist() + greedy_answer(student, prompt)
        assert row["labels"].tolist() == [0] * length + [1] * (len(row["input_ids"]) - length)


def test_an_answer_ends_with_its_end_token():
    student, (row,) = tiny_model("linear"), rows((10,))
    prompt = row["input_ids"][:5]
    whole = greedy_answer(student, prompt)
    ends = {whole[2], 98}
    expected = whole[: whole.index(whole[2]) + 1]
    made = writer(end_tokens=ends)(student, pad([row, *rows((30,))], 2), step=0, index=0)
    found = made["input_ids"][0][made["attention_mask"][0] == 1].tolist()
    assert found == prompt.tolist() + expected


@pytest.mark.parametrize("collate", [pad, pack])
def test_pictures_of_the_prompt_are_seen_and_later_ones_left_out(collate):
    student, given = tiny_model("hybrid"), with_pictures()
    made = writer(collate)(student, collate(given, pad_token_id=2), step=0, index=0)
    tile = given[0]["pixel_values"][:1]
    assert torch.equal(made["pixel_values"], tile)
    assert int((made["input_ids"] == IMAGE_TOKEN).sum()) == TILE_TOKENS
    first, second = split_rows(made, student.config)
    prompt = given[0]["input_ids"][:9]
    assert first["input_ids"].tolist() == prompt.tolist() + greedy_answer(student, prompt, pixel_values=tile)
    assert torch.equal(first["pixel_values"], tile) and len(second["pixel_values"]) == 0


def test_sampled_answers_have_the_students_distribution():
    student, (row,) = tiny_model("linear"), rows((10,))
    count = 4000
    made = writer(max_new_tokens=1, temperature=2.0)(student, pad([row] * count, 2), step=0, index=0)
    sampled = made["input_ids"][made["answer_mask"]]
    with torch.no_grad():
        expected = (student(row["input_ids"][None, :5]).logits[0, -1] / 2).softmax(-1) * count
    found = torch.bincount(sampled, minlength=len(expected))
    often = expected > 5
    # Pearson's statistic has the mean and half the variance of its degrees of freedom.
    statistic, degrees = ((found - expected)[often].square() / expected[often]).sum(), int(often.sum())
    assert degrees > 10 and abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_the_same_seed_and_step_give_the_same_answers_and_touch_nothing_else():
    student, batch = tiny_model("linear").train(), pad(rows(), 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def sample(step=3, index=1, **changes):
        return writer(temperature=1.0, **changes)(student, batch, step, index)["input_ids"].tolist()

    found = sample()
    assert sample() == found and torch.equal(torch.get_rng_state(), before) and student.training
    for other in ({"step": 4}, {"index": 0}, {"seed": 6}, {"process_index": 1}):
        assert sample(**other) != found


def test_so_many_micro_batches_as_said_are_the_students():
    student, batch = tiny_model("linear"), pad(rows((4, 4)), 2)
    half = writer(share=0.25, max_new_tokens=1)
    chosen = [half(student, batch, step, index) is not batch for step in range(100) for index in range(2)]
    assert 30 <= sum(chosen) <= 70  # of 200; three standard deviations are 18
    assert chosen == [half(student, batch, step, index) is not batch for step in range(100) for index in range(2)]
    assert writer(share=0.0)(student, batch, 0, 0) is batch


def test_a_row_without_an_answer_is_a_prompt():
    row = {"input_ids": torch.arange(5), "labels": torch.full((5,), -100)}
    assert torch.equal(cut_to_prompt(row, None)["input_ids"], row["input_ids"])


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("collate", [pad, pack])
def test_the_loss_compares_own_answers_with_the_teacher_and_takes_labels_of_the_others_only(collate, answers_only):
    """Two micro-batches of a step, one of them written by the student, against plain formulas row by row."""
    teacher, student = pair(attention=(1,))
    given = [rows((12, 7)), rows((9, 14))]
    batches = [collate(part, pad_token_id=2) for part in given]
    batches[0] = writer(collate, temperature=1.0)(student, batches[0], step=0, index=0)
    totals = sum(count_tokens(batch) for batch in batches)
    options = {"hard_weight": 0.5, "answers_only": answers_only, "divergence": "reverse", "chunk_size": 5}
    distiller = EndToEndDistiller(teacher, student, **options)
    found = sum(distiller(**batch, num_items_in_batch=totals) for batch in batches)

    kl, hard, positions, labelled = 0.0, 0.0, 0, 0
    for batch, own in zip(batches, (True, False), strict=True):
        mask = batch["answer_mask"] if own else batch["labels"] != -100
        answers = split_rows(batch | {"labels": mask.long()}, student.config)
        for row in answers:
            ids, is_answer = row["input_ids"], row["labels"].bool()
            with torch.no_grad():
                q, p = (model(ids[None]).logits[0].log_softmax(-1) for model in (student, teacher))
            counts = torch.cat([is_answer[1:], torch.tensor([False])]) if answers_only else torch.ones(len(ids)) > 0
            kl, positions = kl + (q.exp() * (q - p)).sum(-1)[counts].sum(), positions + int(counts.sum())
            if not own:
                predicts = is_answer[1:].nonzero()[:, 0]
                hard, labelled = hard - q[predicts, ids[predicts + 1]].sum(), labelled + len(predicts)
    torch.testing.assert_close(found, kl / positions + 0.5 * hard / labelled)
