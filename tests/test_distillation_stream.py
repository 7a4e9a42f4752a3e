"""Streams go on exactly where they were stopped, and decode nothing twice."""

import json
from itertools import islice

import pytest
import torch
from conversations import answers_of, numbered, turns

from mmmamba.conversion.distillation.data import ConversationEncoder, ConversationStream, StreamLoader


RECORDS = 23


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The datasets library, writing nowhere but here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    return datasets


class CountingEncoder(ConversationEncoder):
    """Remembers which records it has decoded."""

    def __init__(self, processor):
        super().__init__(processor)
        self.decoded = []

    def __call__(self, record, *args, **kwargs):
        self.decoded.append(record["id"])
        return super().__call__(record, *args, **kwargs)


@pytest.fixture
def make_stream(datasets, processor, tmp_path):
    """From files, a buffer and processes to a stream of two datasets, one of them with two bad records."""
    made = {}

    def write(name, files, start, bad):
        records = numbered(RECORDS, start)
        for index in bad:
            records[index]["conversations"] = turns("Only a question.")
        folder = tmp_path / f"{name}-{files}"
        folder.mkdir(exist_ok=True)
        table = datasets.Dataset.from_list(records)
        for number in range(files):
            table.shard(files, number, contiguous=True).to_parquet(folder / f"{number}.parquet")
        return str(folder / "*.parquet")

    def make(files, buffer_size, processes=1, process=0):
        if files not in made:
            made[files] = write("a", files, 0, (3, 4)), write("b", 1, 100, ())
        sources = [
            (datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True), paths[0], ".", False)
            for paths in made[files]
        ]
        return ConversationStream(CountingEncoder(processor), sources, 7, buffer_size, processes, process)

    return make


def texts(batches, processor):
    return [[answers_of({"labels": labels}, processor.tokenizer)[0] for labels in batch] for batch in batches]


def collate(rows):
    return [row["labels"] for row in rows]


@pytest.mark.parametrize(("files", "buffer_size"), [(1, 0), (1, 6), (4, 6), (12, 1000), (3, 5)])
def test_a_stream_goes_on_where_it_stopped(files, buffer_size, make_stream, processor):
    """In the middle of a block, at its end, and in the second epoch."""
    straight = make_stream(files, buffer_size)
    whole = texts(islice(StreamLoader(straight, 2, collate), 40), processor)
    for stop in (1, 6, 29):
        first = StreamLoader(make_stream(files, buffer_size), 2, collate)
        assert texts(islice(first, stop), processor) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        assert state["rows"] == 2 * stop
        again = make_stream(files, buffer_size)
        again.load_state_dict(state)
        assert texts(islice(StreamLoader(again, 2, collate), 40 - stop), processor) == whole[stop:]
        assert [*first.stream.encoder.decoded, *again.encoder.decoded] == straight.encoder.decoded  # nothing twice


def test_every_process_and_worker_has_its_own_position(make_stream, processor):
    for process in (0, 1):
        whole = texts(islice(StreamLoader(make_stream(4, 6, 2, process), 3, collate, 2), 14), processor)
        first = StreamLoader(make_stream(4, 6, 2, process), 3, collate, 2)
        assert texts(islice(first, 5), processor) == whole[:5]  # 15 rows: the next one is the second worker's
        state = json.loads(json.dumps(first.state_dict()))
        for workers in (0, 1, 2, 3):
            again = make_stream(4, 6, 2, process)
            again.load_state_dict(state)
            loader = StreamLoader(again, 3, collate, workers)
            assert loader.num_workers == min(workers, 2)
            assert texts(islice(loader, 9), processor) == whole[5:]


def test_the_order_of_rows_does_not_depend_on_the_batch_size(make_stream, processor):
    rows = []
    for batch_size in (1, 2, 6):
        batches = texts(islice(StreamLoader(make_stream(4, 6), batch_size, collate, 2), 12 // batch_size), processor)
        rows.append([row for batch in batches for row in batch])
    assert rows[0] == rows[1] == rows[2]


def test_reading_a_stream_leaves_the_random_numbers_of_the_training_alone(make_stream):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(StreamLoader(make_stream(1, 6), 2, collate, 1)))
    assert torch.equal(torch.rand(1), expected)
