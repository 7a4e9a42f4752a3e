"""Documents as training rows, and models whose folder has only a tokenizer."""

import json
import os

import pytest
import torch
from byte_tokenizer import CHATML, byte_tokenizer
from conversations import numbered, picture, same, turns, write_lines
from tiny_models import tiny_config

from mmmamba.conversion.distillation.data import (
    BadRow,
    ConversationEncoder,
    UnusableData,
    documents,
    open_data,
    pack,
    pad,
)
from mmmamba.conversion.distillation.data.curriculum import CurriculumSampler, LengthCurriculum
from mmmamba.conversion.distillation.data.training_data import load_processor
from mmmamba.conversion.llama import text_tokenizer
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast


STORY = "The dog sleeps. It is 12 o'clock; où est le chat?\n\nAn answer is a question's end.\n"
TYPED = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|></s><s><image>"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The datasets library, writing nowhere but here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    return datasets


def ids_of(rows):
    return [rows[i]["input_ids"].tolist() for i in range(len(rows))]


@pytest.fixture(params=["ours", "another", "another with a beginning token", "an adapted one"])
def any_tokenizer(request, processor):
    if request.param == "ours":
        return processor.tokenizer
    tokenizer = byte_tokenizer(bos="beginning" in request.param)
    return text_tokenizer(tokenizer) if "adapted" in request.param else tokenizer


@pytest.mark.parametrize("row_tokens", [2, 7, 500])
def test_a_document_is_cut_into_rows_one_after_the_other(any_tokenizer, row_tokens, tmp_path):
    texts = [STORY, "Short.", STORY * 3]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    rows = open_data({"documents": str(tmp_path / "*.txt")}, any_tokenizer, row_tokens=row_tokens)
    expected = []
    for text in texts:
        whole = [*any_tokenizer(text)["input_ids"], any_tokenizer.eos_token_id]
        cut = [whole[start : start + row_tokens] for start in range(0, len(whole), row_tokens)]
        expected += [row for row in cut if len(row) > 1]  # nothing in a single token is predicted
    assert ids_of(rows) == expected
    for index in range(len(rows)):
        row = rows[index]
        assert row.keys() == {"input_ids", "labels"} and torch.equal(row["input_ids"], row["labels"])
        assert row["input_ids"].dtype == torch.int64
    begins = any_tokenizer("")["input_ids"]
    assert ids_of(rows)[0][: len(begins)] == begins


def test_files_of_each_kind_are_read(processor, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.")
    (tmp_path / "deep" / "er" / "b.rst").write_text("Three.")
    write_lines(tmp_path / "deep" / "c.jsonl", [{"text": "Four."}, {"text": "Five.", "id": 3}])
    (tmp_path / "deep" / "d.png").write_bytes(b"\x89PNG")
    rows = open_data({"documents": str(tmp_path / "**" / "*")}, processor)
    found = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_of(rows)]
    assert found == ["One.\nTwo.", "Four.", "Five.", "Three."]  # in the order of their paths


def test_a_column_of_a_dataset_holds_documents(caches, processor, tmp_path):
    file = write_lines(
        tmp_path / "a.jsonl", [{"body": STORY, "id": 1}, {"body": None, "id": 2}, {"body": "B.", "id": 3}]
    )
    entry = {"dataset": "json", "data_files": str(file), "text": "body"}
    rows = open_data(entry | {"repeat": 2}, processor, row_tokens=500)
    assert len(rows) == 6 and rows.num_records == 3
    (tmp_path / "story.txt").write_text(STORY)
    same(rows[0], open_data({"documents": str(tmp_path / "story.txt")}, processor, row_tokens=500)[0])
    assert rows[1]["bad_rows"] == [("json[1]", "its text is no string but NoneType")]
    with pytest.raises(ValueError, match=r"dataset json has no column text=bodi; it has body, id\.$"):
        open_data(entry | {"text": "bodi"}, processor)


def test_a_document_that_cannot_be_read_is_a_bad_row(processor, tmp_path):
    (tmp_path / "a.txt").write_bytes("Où".encode("latin-1"))
    (tmp_path / "b.txt").write_text("Good.")
    (tmp_path / "c.txt").write_text(" \n\n ")  # without text: left out
    lines = [{"text": 3}, "{", {"body": "x"}, [], '{"text": "lone \\ud800 surrogate"}', {"text": ""}]
    write_lines(tmp_path / "d.jsonl", lines)
    rows = open_data({"documents": str(tmp_path / "*")}, processor)
    assert len(rows) == 7
    bad = dict(rows[0]["bad_rows"])
    assert bad == {str(tmp_path / "a.txt"): "it is not UTF-8 text"}
    same({k: v for k, v in rows[0].items() if k != "bad_rows"}, rows[1])
    bad = dict(rows[2]["bad_rows"])
    reasons = [bad.pop(f"{tmp_path / 'd.jsonl'}:{line}") for line in (1, 2, 3, 4, 5)]
    assert reasons[0] == "its text is no string but int" and "broken JSON" in reasons[1] and "surrogate" in reasons[4]
    assert list(bad) == [str(tmp_path / "a.txt")]


def test_what_looks_like_a_special_token_is_text(any_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x " + TYPED + " y")
    (row,) = ids_of(open_data({"documents": str(tmp_path / "a.txt")}, any_tokenizer, row_tokens=500))
    begins = any_tokenizer("")["input_ids"]
    assert not set(row[len(begins) : -1]) & set(any_tokenizer.all_special_ids)
    assert TYPED in any_tokenizer.decode(row[len(begins) :])


def test_documents_are_encoded_once_and_again_when_they_or_the_tokenizer_change(processor, tmp_path, monkeypatch):
    calls, encode = [], documents._encode
    monkeypatch.setattr(documents, "_encode", lambda *arguments: calls.append(1) or encode(*arguments))
    file, entry = tmp_path / "a.txt", {"documents": str(tmp_path / "a.txt")}
    file.write_text(STORY)
    first = ids_of(open_data(entry, processor, row_tokens=500))
    assert ids_of(open_data(entry, processor, row_tokens=500)) == first
    assert ids_of(open_data(entry, processor, row_tokens=5))[0] == first[0][:5]
    assert len(calls) == 1
    assert ids_of(open_data(entry, byte_tokenizer(), row_tokens=500)) != first
    assert len(calls) == 2
    file.write_text("Another.")
    os.utime(file, ns=(1, 1))
    assert ids_of(open_data(entry, processor)) != first
    assert len(calls) == 3


def test_documents_and_conversations_share_a_batch(processor, encoder, tmp_path):
    picture().save(tmp_path / "a.png")
    lines = [*numbered(1), {"image": "a.png", "conversations": turns("What?", "This")}]
    write_lines(tmp_path / "a.jsonl", lines)
    (tmp_path / "a.txt").write_text(STORY)
    data = [{"documents": str(tmp_path / "a.txt")}, {"file": str(tmp_path / "a.jsonl")}]
    rows = open_data(data, processor, row_tokens=20)
    count = len(rows) - 2
    same(rows[count], encoder(lines[0]))
    taken = [rows[0], rows[count], rows[count + 1]]
    batch, packed = pad(taken, pad_token_id=7), pack(taken)
    for i, row in enumerate(taken):
        assert torch.equal(batch["input_ids"][i, : len(row["input_ids"])], row["input_ids"])
        assert torch.equal(batch["labels"][i, : len(row["labels"])], row["labels"])
    assert (batch["attention_mask"].sum(1) == torch.tensor([len(row["input_ids"]) for row in taken])).all()
    assert torch.equal(batch["pixel_values"], taken[2]["pixel_values"])
    assert torch.equal(packed["pixel_values"], taken[2]["pixel_values"])
    assert packed["labels"][0, 0] == -100 and torch.equal(packed["labels"][0, 1:20], taken[0]["labels"][1:])


@pytest.mark.parametrize("collate", [pad, pack])
def test_a_curriculum_reads_the_same_tokens_in_short_rows_first(collate, processor, tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 4)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    data = [{"documents": str(tmp_path / "*.txt")}, {"file": str(write_lines(tmp_path / "a.jsonl", numbered(2)))}]
    whole = open_data(data, processor, row_tokens=40)
    curriculum = LengthCurriculum(whole, [10, 30, 40])
    steps, rows_per_step = 7, 2
    order = list(CurriculumSampler(curriculum, steps, rows_per_step, seed=3))
    sampler = CurriculumSampler(curriculum, steps, rows_per_step, seed=3)
    assert order == list(sampler) == list(sampler) and len(order) == len(sampler) == 14
    assert sorted(index % len(whole) for index in order[: len(whole)]) == list(range(len(whole)))
    assert order != list(CurriculumSampler(curriculum, steps, rows_per_step, seed=4))
    for step in range(steps):
        indices = order[step * rows_per_step : (step + 1) * rows_per_step]
        length = [10, 30, 40][step * 3 // steps]
        batch = collate([curriculum[index] for index in indices], pad_token_id=7)
        expected = []
        for row in (whole[index % len(whole)] for index in indices):
            is_document = torch.equal(row["labels"], row["input_ids"])
            ids = row["input_ids"]
            cut = [ids[i : i + length] for i in range(0, len(ids), length)] if is_document else [ids]
            expected += [one.tolist() for one in cut if len(one) > 1 or not is_document]
        if collate is pad:
            found = [r[m == 1].tolist() for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        else:
            starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
            found = [part.tolist() for part in batch["input_ids"][0].tensor_split(starts[1:])]
        assert found == expected
        # However they are cut, so many rows of the dataset were read.
        assert batch.get("num_rows", len(found)) == rows_per_step
    bad = collate([curriculum[index] for index in range(len(whole))], pad_token_id=7)["bad_rows"]
    assert bad == [(str(tmp_path / "b.txt"), "it is not UTF-8 text")]


def test_a_single_last_token_is_no_row_of_a_curriculum(processor, tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 4)
    whole = open_data({"documents": str(tmp_path / "a.txt")}, processor, row_tokens=21)
    ids = whole[0]["input_ids"]
    pieces = LengthCurriculum(whole, [10, 21])[0]["rows"]
    assert [piece["input_ids"].tolist() for piece in pieces] == [ids[:10].tolist(), ids[10:20].tolist()]


WRONG = [
    ({"documents": "gone.txt"}, FileNotFoundError, r"documents=gone.txt names no file that ends in \.txt, "),
    ({"documents": "*.bin"}, FileNotFoundError, "names no file"),
    ({"documents": "a.bin"}, ValueError, r"documents=a.bin must end in \.txt, \.md, \.rst, \.jsonl, \.json\."),
    ({"documents": "blank.txt"}, ValueError, "documents=blank.txt holds no text"),
    ({"documents": "a.txt", "root": "x"}, ValueError, "unknown key 'root'; known are documents, repeat"),
    ({"documents": "a.txt", "repeat": 1.5}, ValueError, "repeats 1.5 times"),
    ({"documents": "a.txt", "file": "b.jsonl"}, ValueError, "needs one of file and dataset, or documents"),
    ({"document": "a.txt"}, ValueError, "did you mean documents for document"),
    ({"dataset": "x", "text": "body", "streaming": True}, ValueError, "read by number; leave out streaming"),
    ({"dataset": "x", "text": 3}, ValueError, "text=3 .* wrong type"),
]


@pytest.mark.parametrize(("entry", "kind", "words"), WRONG)
def test_a_wrong_entry_is_refused_at_once(entry, kind, words, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.bin").touch()
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(kind, match=words):
        open_data(entry, processor)


# --- tokenizers alone ------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": ["Hi", "Hello"],
    "several turns": ["Hi", "Hello", "And now?", "Nothing", "Why?", "So"],
    "blanks around": [" Hi ", " \n Hello \n", "\n\nNow", "\n\n\nyes\n"],
    "other scripts": ["这是什么？", "是一只猫🙂", "Où?", "là"],
    "answers like prompts": ["Hi", "assistant\nme", "user\n", "assistant\nassistant\n"],
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("texts", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_any_fast_tokenizers_conversations_are_those_of_transformers(texts, adapted):
    tokenizer = byte_tokenizer()
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    encoder = ConversationEncoder(text_tokenizer(tokenizer) if adapted else tokenizer)
    for record in ({"conversations": turns(*texts)}, {"messages": messages}, {"messages": parts}):
        row = encoder(record)
        assert row.keys() == {"input_ids", "labels"}
        assert row["input_ids"].tolist() == expected["input_ids"]
        masked = row["input_ids"].masked_fill(torch.tensor(expected["assistant_masks"]) == 0, -100)
        assert row["labels"].tolist() == masked.tolist()


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_typed_stays_text_with_any_fast_tokenizer(adapted):
    tokenizer = text_tokenizer(byte_tokenizer()) if adapted else byte_tokenizer()
    encoder, special = ConversationEncoder(tokenizer), set(tokenizer.all_special_ids)
    harmless = encoder({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]})
    for texts in ((TYPED, "No"), ("Hi", TYPED), (TYPED, TYPED)):
        messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)]
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        ids = encoder({"messages": messages})["input_ids"].tolist()
        assert [i for i in ids if i in special] == [i for i in harmless["input_ids"].tolist() if i in special]
        assert tokenizer.decode(ids).count(TYPED) == texts.count(TYPED)


def test_pictures_are_bad_rows_for_a_tokenizer_alone(tmp_path):
    picture().save(tmp_path / "a.png")
    lines = [{"image": "a.png", "conversations": turns("What?", "This")}, *numbered(2)]
    rows = open_data({"file": str(write_lines(tmp_path / "a.jsonl", lines))}, byte_tokenizer(), max_tokens=60)
    ((_, reason),) = rows[0]["bad_rows"]
    assert reason == "it has images, which the model cannot read: its folder has no image processor"
    with pytest.raises(BadRow, match="more than max_tokens=5"):
        ConversationEncoder(byte_tokenizer(), max_tokens=5)(numbered(1)[0])
    write_lines(tmp_path / "a.jsonl", lines[:1])
    with pytest.raises(UnusableData, match="which the model cannot read"):
        open_data({"file": str(tmp_path / "a.jsonl")}, byte_tokenizer())[0]


def test_a_tokenizer_that_conversations_cannot_use_is_refused_and_documents_are_read(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", numbered(1))
    with pytest.raises(ValueError, match="has no chat template, which conversations need"):
        open_data({"file": str(file)}, byte_tokenizer(chat_template=None))
    (tmp_path / "a.txt").write_text(STORY)
    assert len(open_data({"documents": str(tmp_path / "a.txt")}, byte_tokenizer(chat_template=None))) == 1
    failing = CHATML + "{{ raise_exception('never') }}"
    with pytest.raises(BadRow, match=r"it cannot be rendered \(.*never"):
        ConversationEncoder(byte_tokenizer(chat_template=failing))


def test_a_folder_without_image_processor_gives_its_tokenizer_of_whatever_class(processor, tmp_path):
    for folder in ("another", "ours"):
        tiny_config("teacher").save_pretrained(tmp_path / folder)
    byte_tokenizer().save_pretrained(tmp_path / "another")
    found = load_processor(tmp_path / "another")
    assert found(STORY)["input_ids"] == byte_tokenizer()(STORY)["input_ids"] and found.chat_template == CHATML
    processor.tokenizer.save_pretrained(tmp_path / "ours")
    assert type(load_processor(tmp_path / "ours")) is MmMambaTokenizerFast
    config = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"].startswith("MmMamba")
    (tmp_path / "ours" / "tokenizer.model").unlink()
    assert load_processor(tmp_path / "ours")(STORY)["input_ids"] == processor.tokenizer(STORY)["input_ids"]
    (tmp_path / "ours" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer; put the model's tokenizer files into it"):
        load_processor(tmp_path / "ours")
