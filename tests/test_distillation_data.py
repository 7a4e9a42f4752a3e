"""Users' conversations as training rows: files, datasets, streams, bad rows, batches."""

import json
import multiprocessing
import os
import pickle
import random
import sys

import pytest
import torch
from conversations import answers_of, numbered, picture, processor_with, same, turns, write_lines
from torch.utils.data import DataLoader

from mmmamba.conversion.convert import chat_template
from mmmamba.conversion.distillation.data import (
    BadRowCounter,
    ConversationDataset,
    ConversationEncoder,
    ConversationStream,
    TileNormalizer,
    UnusableData,
    dataset,
    open_data,
    pack,
    pad,
    records,
)
from mmmamba.conversion.distillation.data.records import RecordFile


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The datasets library, writing nowhere but here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    return datasets


def test_a_bad_row_is_replaced_by_the_next_good_one(encoder, tmp_path):
    lines = [
        numbered(1)[0],
        '{"conversations": [',
        "",
        {"image": "no.png", "conversations": turns("a", "b")},
        numbered(1, 4)[0],
        {"conversations": turns("<image>", "b")},
    ]
    file = write_lines(tmp_path / "a.jsonl", lines)
    rows = ConversationDataset(encoder, [(RecordFile(file), 1)])
    assert len(rows) == 5
    good = [encoder(lines[0]), encoder(lines[4])]
    same(rows[0], good[0])
    same(rows[3], good[1])
    (name, reason), (other_name, _) = rows[1]["bad_rows"]
    assert (name, other_name) == (f"{file}:2", f"{file}:4")
    assert reason.startswith("it is broken JSON (Expecting value")
    same({k: v for k, v in rows[1].items() if k != "bad_rows"}, good[1])
    same({k: v for k, v in rows[4].items() if k != "bad_rows"}, good[0])  # after the last, the first
    assert rows[4]["bad_rows"] == [(f"{file}:6", "the record has 1 <image> placeholders but 0 images")]
    same(rows[2], rows[-3])
    with pytest.raises(IndexError):
        rows[5]
    # However often records are read, so many are different.
    for repeat, size in ((1, 5), (10, 5), (0.4, 2)):
        assert ConversationDataset(encoder, [(RecordFile(file), repeat)]).num_records == size


def test_nothing_but_bad_rows_is_an_error(encoder, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", ["{", "[]", "1"])
    with pytest.raises(ValueError, match=r"3 records in a row are bad .*a\.jsonl:1: it is broken JSON"):
        ConversationDataset(encoder, [(RecordFile(file), 1)])[0]
    monkeypatch.setattr(dataset, "MAX_CONSECUTIVE_BAD_ROWS", 2)
    with pytest.raises(ValueError, match="2 records in a row"):
        ConversationDataset(encoder, [(RecordFile(write_lines(file, ["{", "{", numbered(1)[0]])), 1)])[0]


def test_bad_rows_are_counted_once_and_stop_a_run(tmp_path):
    file = tmp_path / "log" / "bad.jsonl"
    counter = BadRowCounter(max_share=0.1, file=file, num_records=119)
    one, two = ("a: b.jsonl:3", "it is broken"), ("parquet[7]", "the image c.png: gone")
    assert counter.add([one, two, one]) == 2
    assert counter.add([one]) == 0
    assert counter.count == 2
    assert counter.quoted == ["a: b.jsonl:3: it is broken", "parquet[7]: the image c.png: gone"]
    counter.check(20)  # below min_seen
    counter.check(79)
    counter.add([(f"x[{i}]", "y") for i in range(8)])
    counter.check(1)  # 10 of 100
    counter.add([("x[8]", "y"), ("x[9]", "y")])
    counter.check(18)  # 12 of 118 may be chance
    with pytest.raises(
        ValueError, match=r"12 bad rows among 119 rows \(10.08%\) are more than the 10.00%.*first are a: b"
    ):
        counter.check(1)
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(logged) == 12
    assert logged[0] == {"row": "a: b.jsonl:3", "reason": "it is broken", "seen": 0}
    assert logged[-1] == {"row": "x[9]", "reason": "y", "seen": 100}


def test_a_resumed_run_knows_the_bad_rows_that_it_has_seen(tmp_path):
    file = tmp_path / "bad.jsonl"
    bad = [(f"x[{i}]", "y") for i in range(30)]
    whole = BadRowCounter(0.01, file)
    for one in bad:
        whole.check(100)
        whole.add([one])
    lines = file.read_text()
    # From a checkpoint in the middle: what was named after it will be met again, by every process.
    main, other = BadRowCounter(0.01, file, seen=1500), BadRowCounter(0.01, file, writes=False, seen=1500)
    for again in (main, other):
        assert again.count == 14 and again.quoted == [f"x[{i}]: y" for i in range(3)]
        for one in bad[14:]:
            assert again.add([one]) == 1
            again.check(100)
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [f"x[{i}]" for i in range(30)]
    # From the start, with all of them named: none was met.
    file.write_text(lines + '{"row": "x[')
    start = BadRowCounter(0.01, file, seen=0)
    start.add(bad[:1])
    start.check(128)
    assert start.count == 1


def test_too_many_bad_rows_stop_a_run_and_chance_does_not():
    generator = random.Random(0)
    for share, stops in ((0.005, False), (0.02, True)):
        stopped = 0
        for _ in range(50):
            counter = BadRowCounter(0.01)
            try:
                for step in range(100):
                    counter.add([(f"x[{step * 128 + i}]", "y") for i in range(128) if generator.random() < share])
                    counter.check(128)
            except ValueError:
                stopped += 1
        assert stopped == 50 if stops else stopped == 0


def test_the_share_counts_early_for_a_small_dataset():
    small = BadRowCounter(0.1, num_records=10)
    small.add([("x[0]", "y"), ("x[1]", "y")])
    small.check(9)
    with pytest.raises(ValueError, match="2 bad rows among 10 rows"):
        small.check(41)  # seen five times, they are still two of ten
    allowing = BadRowCounter(1.0)
    allowing.add([(f"x[{i}]", "y") for i in range(200)])
    allowing.check(200)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_json_list_and_json_lines_give_the_same_records(tmp_path):
    items = [*numbered(3), {"conversations": turns("Où est «é»?", "là 🙂 ] } ,")}]
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(i, ensure_ascii=False).encode() for i in items))
    other = write_lines(tmp_path / "other.json", items)
    whole, spread = tmp_path / "whole.json", tmp_path / "spread.json"
    whole.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    spread.write_text("\n " + json.dumps(items, indent=2), encoding="utf-8")
    for file in (lines, other, whole, spread):
        (opened, repeat), *more = records.open_files(file)
        assert [opened.read(i) for i in range(len(opened))] == items
        assert (repeat, more) == (1, [])
    assert opened.name(2) == f"{spread}[2]"
    assert RecordFile(other).name(2) == f"{other}:3"


def test_line_ends_are_found_across_chunks(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", numbered(40))
    for size in (1, 7, 64):
        monkeypatch.setattr(records, "_SCAN_BYTES", size)
        opened = RecordFile(file)
        assert [opened.read(i) for i in (39, 0, 17)] == [numbered(40)[i] for i in (39, 0, 17)]


def test_a_large_file_is_indexed_not_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"conversations": []}\n' * 1_700_000)
    opened = RecordFile(file)
    assert len(opened) == 1_700_000
    assert sum(array.nbytes for array in (opened.starts, opened.ends, opened.line_numbers)) == 3 * 8 * len(opened)
    assert opened.read(len(opened) - 1) == {"conversations": []}
    assert opened.name(len(opened) - 1) == f"{file}:1700000"


def test_forked_processes_do_not_move_each_others_file_position(tmp_path):
    source = RecordFile(write_lines(tmp_path / "a.jsonl", numbered(1000)))
    source.read(999)
    place = os.lseek(source._handle[1].fileno(), 0, os.SEEK_CUR)
    child = multiprocessing.get_context("fork").Process(target=source.read, args=(0,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert os.lseek(source._handle[1].fileno(), 0, os.SEEK_CUR) == place


def test_a_meta_file_lists_files(encoder, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_lines(tmp_path / "with.jsonl", [{"image": "a.png", "conversations": turns("a", "b")}])
    write_lines(tmp_path / "elsewhere" / "text.jsonl", numbered(10))
    entry = {"root": "images/", "annotation": "with.jsonl", "data_augment": True, "length": 99}
    meta = {"one": entry | {"repeat_time": 3}, "two": {"annotation": "text.jsonl", "root": "", "repeat_time": 0.5}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    rows = ConversationDataset(encoder, records.open_files(tmp_path / "meta.json"))
    assert len(rows) == 3 + 5
    assert [len(rows[i]["pixel_values"]) for i in range(8)] == [1] * 3 + [0] * 5
    for i, number in enumerate(range(0, 10, 2)):  # evenly spread
        same(rows[3 + i], encoder(numbered(10)[number]))

    def refused(words, kind=ValueError, **changes):
        (tmp_path / "meta.json").write_text(json.dumps({"one": entry | changes}))
        with pytest.raises(kind, match=words):
            records.open_files(tmp_path / "meta.json")

    refused("one has the unknown key 'max_dynamic_path'", max_dynamic_path=6)
    refused("one has max_dynamic_patch='6'; give a whole number of tiles", max_dynamic_patch="6")
    refused("one has max_dynamic_patch=0; give a whole number of tiles", max_dynamic_patch=0)
    refused("one repeats 1.5 times", repeat_time=1.5)
    refused("one repeats 0 times", repeat_time=0)
    refused("one has no annotation", annotation=None)
    refused("names gone.jsonl, which is neither in", FileNotFoundError, annotation="gone.jsonl")
    refused("names gone, which is neither in", FileNotFoundError, root="gone")


def test_a_meta_file_limits_tiles(encoder, tmp_path):
    picture(96, 48).save(tmp_path / "a.png")
    lines = [{"image": ["a.png"] * count, "conversations": turns("a", "b")} for count in (1, 2)]
    write_lines(tmp_path / "lines.jsonl", lines)
    tiles = []
    for most in (1, 2, 4):
        (tmp_path / "meta.json").write_text(
            json.dumps({"one": {"annotation": "lines.jsonl", "max_dynamic_patch": most}})
        )
        rows = ConversationDataset(encoder, records.open_files(tmp_path / "meta.json"))
        tiles.append([len(rows[i]["pixel_values"]) for i in range(2)])
    assert tiles == [[1, 2], [3, 2], [3, 6]]  # two and a thumbnail, where there are as many for each picture


def test_the_same_numbers_give_the_same_rows_in_any_process(encoder, tmp_path):
    lines = [*numbered(5), "{", *numbered(6, 6)]
    source = RecordFile(write_lines(tmp_path / "a.jsonl", lines))
    rows = ConversationDataset(encoder, [(source, 2)])
    truth = [rows[i] for i in range(len(rows))]  # the file is open from here on
    order = random.Random(0).sample(range(22), 22)
    for copy in (rows, pickle.loads(pickle.dumps(rows))):  # forked workers get the first, spawned ones the second
        loader = DataLoader(copy, sampler=order, num_workers=2, collate_fn=list, multiprocessing_context="fork")
        for index, (row,) in zip(order, loader, strict=True):
            same(row, truth[index])


# --- datasets --------------------------------------------------------------------------------------------------------


def parquet(datasets, folder, files, records, **features):
    """Files `0.parquet`, … of equally many records each."""
    table = datasets.Dataset.from_list(records)
    if features:
        table = table.cast(datasets.Features(table.features | features))
    for number in range(files):
        table.shard(files, number, contiguous=True).to_parquet(folder / f"{number}.parquet")
    return str(folder / "*.parquet")


def image_records(tmp_path, count):
    found = []
    for i in range(count):
        picture(16 + i, 16).save(tmp_path / "a.png")
        content = [{"type": "image", "text": None}, {"type": "text", "text": f"Which is {i}?"}]
        messages = [{"role": "user", "content": content}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"number {i}"}]})
        image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
        found.append({"messages": messages, "images": [image]})
    found[2]["images"][0]["bytes"] = found[2]["images"][0]["bytes"][:60]
    return found


def test_a_parquet_file_is_read_by_number(caches, processor, encoder, tmp_path):
    given = image_records(tmp_path, 5)
    files = parquet(caches, tmp_path, 1, given, images=caches.List(caches.Image()))
    rows = open_data([{"dataset": "parquet", "data_files": files, "repeat": 2}], processor, max_tokens=200)
    assert isinstance(rows, ConversationDataset)
    assert len(rows) == 10
    for index in (0, 1, 3, 9):
        same(rows[index], encoder(given[index % 5]))
    ((name, reason),) = rows[2]["bad_rows"]
    assert name == "parquet[2]" and reason.startswith("it cannot be read (")
    assert "0x" not in reason


@pytest.mark.parametrize("buffer_size", [0, 4])
def test_a_stream_repeats_and_names_bad_rows(buffer_size, caches, processor, encoder, tmp_path):
    given = image_records(tmp_path, 6)
    files = parquet(caches, tmp_path, 2, given, images=caches.List(caches.Image()))
    spec = {"dataset": "parquet", "data_files": files, "streaming": True}
    stream = open_data(spec, processor, seed=1, buffer_size=buffer_size)
    assert isinstance(stream, ConversationStream)
    epochs, each = [], iter(stream)
    for epoch in range(3):
        rows = [next(each) for _ in range(5)]
        texts = [answers_of(row, processor.tokenizer)[0] for row in rows]
        assert sorted(texts) == [f"number {i}<|im_end|>" for i in (0, 1, 3, 4, 5)]
        for row, text in zip(rows, texts, strict=True):
            same({k: row[k] for k in ("input_ids", "labels", "pixel_values")}, encoder(given[int(text[7])]))
        epochs.append(texts)
        names = [name for row in rows for name, _ in row.get("bad_rows", [])]
        if not buffer_size:
            assert names == [f"parquet[reader 0 of 1, epoch {epoch}, record 2]"]
        if buffer_size == 0:
            assert epochs[0] == sorted(epochs[0])
    if buffer_size:
        assert epochs[0] != epochs[1]
    again = iter(open_data(spec, processor, seed=1, buffer_size=buffer_size))
    assert [answers_of(next(again), processor.tokenizer)[0] for _ in range(15)] == [
        text for texts in epochs for text in texts
    ]


@pytest.mark.parametrize(("files", "processes", "workers"), [(2, 1, 2), (4, 2, 2), (3, 1, 2), (1, 2, 2), (2, 1, 0)])
def test_every_record_has_exactly_one_reader(files, processes, workers, caches, processor, tmp_path):
    given = numbered(24)
    paths = parquet(caches, tmp_path, files, given)
    epochs = [[], []]
    for process in range(processes):
        stream = open_data(
            {"dataset": "parquet", "data_files": paths, "streaming": True},
            processor,
            buffer_size=3,
            num_processes=processes,
            process_index=process,
        )
        rows = iter(DataLoader(stream, batch_size=None, num_workers=workers))
        for seen in epochs:
            seen += [answers_of(next(rows), processor.tokenizer)[0] for _ in range(24 // processes)]
    for seen in epochs:
        assert sorted(seen) == sorted(f"It is {i}.<|im_end|>" for i in range(24))


def test_a_record_is_decoded_by_its_reader_only(caches, processor, tmp_path):
    paths = parquet(caches, tmp_path, 1, numbered(12))
    decoded = []

    class Counting(ConversationEncoder):
        def __call__(self, record, *arguments, **options):
            decoded.append(record["id"])
            return super().__call__(record, *arguments, **options)

    dataset = caches.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    for process in range(3):
        each = iter(ConversationStream(Counting(processor), [(dataset, "x", ".", False)], 0, 4, 3, process))
        for _ in range(4):
            next(each)
    assert sorted(decoded) == sorted(f"r{i}" for i in range(12))


def test_bad_records_of_a_stream_keep_their_id(caches, processor, tmp_path, monkeypatch):
    given = numbered(4)
    given[1]["conversations"] = given[1]["conversations"][:1]
    spec = {"dataset": "parquet", "data_files": parquet(caches, tmp_path, 1, given), "streaming": True}
    each = iter(open_data(spec, processor, buffer_size=0))
    assert next(each).keys() == {"input_ids", "labels", "pixel_values"}
    assert next(each)["bad_rows"] == [("parquet[id r1]", "the conversation has no answer")]
    for one in given:
        one["conversations"] = one["conversations"][:1]
    spec["data_files"] = parquet(caches, tmp_path, 1, given)
    with pytest.raises(
        ValueError, match=r"4 records in a row are bad .* parquet\[id r0\]: the conversation has no answer"
    ):
        next(iter(open_data(spec, processor)))
    with pytest.raises(ValueError, match="fewer records than its 9 readers"):
        next(iter(open_data(spec, processor, num_processes=9, process_index=8)))


def test_several_streams_alternate(caches, processor, tmp_path):
    specs = []
    for name, start in (("one", 0), ("two", 50)):
        (tmp_path / name).mkdir()
        files = parquet(caches, tmp_path / name, 1, numbered(3, start))
        specs.append({"dataset": "parquet", "data_files": files, "streaming": True})
    each = iter(open_data(specs, processor, buffer_size=0))
    texts = [answers_of(next(each), processor.tokenizer)[0] for _ in range(4)]
    assert texts == [f"It is {i}.<|im_end|>" for i in (0, 50, 1, 51)]


@pytest.mark.parametrize("streaming", [False, True])
def test_json_may_mix_text_and_parts(streaming, caches, processor, encoder, tmp_path):
    picture().save(tmp_path / "a.png")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    given = [
        {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "This"}],
            "images": ["a.png"],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "images": []},
    ]
    file = write_lines(tmp_path / "a.jsonl", given)
    spec = {"dataset": "json", "data_files": str(file), "streaming": streaming}
    rows = open_data(spec, processor, buffer_size=0)
    each = iter(rows) if streaming else (rows[i] for i in range(2))
    for record in given:
        same(next(each), encoder(record, tmp_path))


# --- recipes' entries ------------------------------------------------------------------------------------------------


def test_files_are_opened_with_their_root(processor, encoder, tmp_path):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "a.png")
    picture(32, 16).save(tmp_path / "a.png")
    record = {"image": "a.png", "conversations": turns("a", "b")}
    file = str(write_lines(tmp_path / "a.jsonl", [record]))
    rows = open_data([{"file": file}, {"file": file, "root": str(tmp_path / "pictures"), "repeat": 2}], processor)
    assert [len(rows[i]["pixel_values"]) for i in range(len(rows))] == [3, 1, 1]
    assert open_data({"file": file}, processor, max_tokens=None).encoder.max_tokens is None


def test_an_entry_may_allow_images_outside_of_root(caches, processor, encoder, tmp_path):
    (tmp_path / "root").mkdir()
    picture().save(tmp_path / "a.png")
    record = {"image": "../a.png", "conversations": turns("a", "b")}
    file = str(write_lines(tmp_path / "a.jsonl", [record]))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"one": {"annotation": "a.jsonl", "root": "root"}}))
    truth = encoder({"image": picture(), "conversations": turns("a", "b")})
    for entry in (
        {"file": file, "root": str(tmp_path / "root")},
        {"file": str(meta)},
        {"dataset": "json", "data_files": file, "root": str(tmp_path / "root")},
        {"dataset": "json", "data_files": file, "root": str(tmp_path / "root"), "streaming": True},
    ):
        same(next(iter(open_data(entry | {"image_paths": "any"}, processor))), truth)
        with pytest.raises(UnusableData, match=r"\.\./a\.png is outside of .*root, which `image_paths: any`"):
            next(iter(open_data(entry, processor)))


WRONG = [
    ([], ValueError, "names nothing"),
    (["a.jsonl"], ValueError, "must be keys and values"),
    ([{"file": "a.jsonl", "rot": "x"}], ValueError, "unknown key 'rot'; did you mean root"),
    ([{"dataset": "x", "streamin": True}], ValueError, "unknown key 'streamin'; did you mean streaming"),
    ([{"file": "a.jsonl", "zzz": 1}], ValueError, "unknown key 'zzz'; known are file, root, image_paths, repeat"),
    ([{"file": "a.jsonl", "image_paths": "all"}], ValueError, "image_paths='all' .* give root .* or any"),
    ([{"flie": "a.jsonl"}], ValueError, "did you mean file for flie"),
    ([{"file": "a.jsonl", "dataset": "x"}], ValueError, "needs one of file and dataset"),
    ([{"file": 3}], ValueError, "file=3 .* wrong type"),
    ([{"file": "a.jsonl", "repeat": 1.5}], ValueError, "repeats 1.5 times"),
    ([{"file": "gone.jsonl"}], FileNotFoundError, "gone.jsonl does not exist"),
    ([{"file": "a.jsonl", "root": "gone"}], FileNotFoundError, "root=gone is no folder"),
    ([{"file": "a.txt"}], ValueError, "must end in .jsonl or .json"),
    ([{"file": "empty.jsonl"}], ValueError, "has no records"),
    ([{"file": "broken.json"}], ValueError, r"broken.json:2 is broken JSON"),
    ([{"file": "meta.json", "repeat": 2}], ValueError, "is a meta file"),
    ([{"file": "a.jsonl"}, {"dataset": "x", "streaming": True}], ValueError, "mixes streaming datasets with others"),
    ([{"dataset": "x", "streaming": True, "repeat": 2}], ValueError, "leave out repeat"),
    ([{"dataset": "parquet", "data_files": "gone.parquet"}], FileNotFoundError, "gone.parquet .* does not exist"),
    ([{"dataset": "json", "data_files": "a.jsonl", "split": "test"}], ValueError, "dataset json cannot be opened"),
]


@pytest.mark.parametrize(("spec", "kind", "words"), WRONG)
def test_a_wrong_entry_is_refused_at_once(spec, kind, words, caches, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", numbered(1))
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.json").write_text('[{"a": 1},\n{"b": }]')
    (tmp_path / "meta.json").write_text('{"one": {"annotation": "a.jsonl"}}')
    with pytest.raises(kind, match=words):
        open_data(spec, processor)


def test_without_the_datasets_library_files_are_read_and_datasets_refused(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = write_lines(tmp_path / "a.jsonl", numbered(1))
    assert len(open_data({"file": str(file)}, processor)) == 1
    with pytest.raises(ImportError, match=r'pip install "mmmamba\[train\]"'):
        open_data({"dataset": "json", "data_files": str(file)}, processor)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(encoder):
    return [
        encoder({"conversations": turns("Hi", "Hello there")}),
        encoder({"image": [picture(32, 16)], "conversations": turns("What?", "This", "Why?", "So")})
        | {"bad_rows": [("a", "x"), ("b", "y")]},
        encoder({"image": [picture()], "conversations": turns("Who?", "Me")}) | {"bad_rows": [("c", "z")]},
    ]


def test_padding_keeps_every_row(rows):
    batch = pickle.loads(pickle.dumps(pad))(rows, pad_token_id=7)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "bad_rows"}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert torch.equal(batch["input_ids"][i, :length], row["input_ids"])
        assert torch.equal(batch["labels"][i, :length], row["labels"])
        assert (batch["input_ids"][i, length:] == 7).all()
        assert (batch["labels"][i, length:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert torch.equal(batch["pixel_values"], torch.cat([row["pixel_values"] for row in rows]))
    assert batch["bad_rows"] == [("a", "x"), ("b", "y"), ("c", "z")]
    assert set(pad(rows[:1], 7)) == {"input_ids", "attention_mask", "labels"}


def test_packing_concatenates_rows(rows):
    before = [row["labels"].clone() for row in rows]
    batch = pickle.loads(pickle.dumps(pack))(rows)
    assert set(batch) == {"input_ids", "position_ids", "labels", "pixel_values", "bad_rows"}
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == batch["labels"].dtype == torch.int64
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert starts == [0, lengths[0], lengths[0] + lengths[1]]
    for row, start, length in zip(rows, starts, lengths, strict=True):
        assert torch.equal(batch["input_ids"][0, start : start + length], row["input_ids"])
        assert torch.equal(batch["labels"][0, start + 1 : start + length], row["labels"][1:])
        assert batch["position_ids"][0, start : start + length].tolist() == list(range(length))
    labelled = [row | {"labels": row["input_ids"].clone()} for row in rows]
    packed = pack(labelled, pad_token_id=7)["labels"][0]
    assert (packed[starts] == -100).all()
    assert (packed != -100).sum() == sum(lengths) - len(rows)
    assert all(torch.equal(row["labels"], old) for row, old in zip(rows, before, strict=True))
    assert all((row["labels"] != -100).all() for row in labelled)
    assert torch.equal(batch["pixel_values"], torch.cat([row["pixel_values"] for row in rows]))
    assert set(pack(rows[:1])) == {"input_ids", "position_ids", "labels"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": (0.1, 0.5, 0.77), "image_std": (1 / 3, 0.9, 0.11)},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_tiles_travel_as_levels_and_are_normalised_to_the_last_bit(options):
    made = processor_with(chat_template("internlm2-chat"))
    for name, value in options.items():
        setattr(made.image_processor, name, value)
    images = [picture(96, 48), picture(), picture(40, 90)]
    expected = made.image_processor(images, return_tensors="pt")["pixel_values"].float()
    normalize = TileNormalizer(made.image_processor)
    record = {"image": images, "conversations": turns("<image><image><image>What?", "This")}
    row = ConversationEncoder(made)(record)
    text = ConversationEncoder(made)({"conversations": turns("Hi", "Ho")})
    for batch in (pad([text, row], 2), pack([row, text])):
        assert batch["pixel_values"].dtype == torch.uint8
        assert torch.equal(normalize(batch["pixel_values"]), expected)
    assert normalize(expected) is expected
