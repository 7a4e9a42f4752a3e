"""Watching a stream: constant memory, answers as if the frames had just been shown, and a clean end."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_conversation import make_chat_model, make_tokenizer

from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.examples.shapes.world import ONE_PICTURE
from mmmamba.examples.streaming import sources, watch
from mmmamba.examples.streaming.scenes import pictures, scenes
from mmmamba.examples.streaming.sources import Clip, Device
from mmmamba.examples.streaming.stream import Stream
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor


OPTIONS = {"max_new_tokens": 8, "do_sample": False}
TOKENS_PER_FRAME = 6  # <img>, four image tokens, </img>
KINDS = ("linear", "hybrid")


@pytest.fixture(scope="module")
def parts():
    """By kind of model: what a `Stream` is made of."""
    tokenizer, processor = make_tokenizer(), MmMambaVideoProcessor(size={"height": 16, "width": 16})
    return {kind: (make_chat_model(kind, tokenizer), tokenizer, processor) for kind in KINDS}


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def after(stream, shown):
    for pixels in shown:
        stream.read(pixels)
    return stream


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, pictures(count=12, hold=4))
    return path


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_linear_model_keeps_as_much_after_hundreds_of_frames_as_after_one(parts):
    stream = after(Stream(*parts["linear"]), frames(1))
    nbytes, ids = stream.nbytes, len(stream.state.ids)
    after(stream, frames(199))
    assert (stream.nbytes, len(stream.state.ids)) == (nbytes, ids)
    assert stream.frames == 200 and stream.tokens > 200 * TOKENS_PER_FRAME


def test_a_hybrid_keeps_keys_and_values_of_every_frame(parts):
    stream = after(Stream(*parts["hybrid"]), frames(3))
    before = stream.nbytes
    after(stream, frames(20))
    text = parts["hybrid"][0].config.text_config
    by_token = 2 * text.layer_types.count("full_attention") * text.num_key_value_heads * text.head_dim * 8  # fp64
    assert stream.nbytes - before == 20 * TOKENS_PER_FRAME * by_token
    assert len(stream.state.ids) == stream.tokens


def test_a_conversation_answers_the_same_when_it_has_forgotten_its_ids(parts, tmp_path):
    model, tokenizer, _ = parts["linear"]
    state = model.conversation(tokenizer).extend("One, two, three, four, and so on.")
    other = state.fork()
    other.forget_ids(keep=2)
    assert other.ids == state.ids[-2:] and len(other) == 2
    other.save(tmp_path / "state")
    loaded = ConversationState.load(tmp_path / "state", model, tokenizer)
    for question in ("What comes next?", "And then?"):
        expected = state.ask(question, OPTIONS)
        assert other.ask(question, OPTIONS) == loaded.ask(question, OPTIONS) == expected
    torch.testing.assert_close(other.cache.tensors(), state.cache.tensors(), rtol=0, atol=0)


def test_ids_that_attention_layers_count_are_not_forgotten(parts):
    state = parts["hybrid"][0].conversation(parts["hybrid"][1]).extend("One, two, three.")
    with pytest.raises(ValueError, match="Attention layers keep keys"):
        state.forget_ids()
    for keep in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="whole number from 1"):
            state.forget_ids(keep)
    assert len(state.ids) == len(state.cache.tensors()["layers.1.keys"][0, 0])


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_in_mid_stream_is_that_of_chat_about_the_same_frames(parts, kind):
    model, tokenizer, processor = parts[kind]
    stream, shown = Stream(*parts[kind]), frames(9)
    for count in (1, 4, 9):
        after(stream, shown[stream.frames : count])
        tiles = processor(list(shown[:count]), return_tensors="pt")["pixel_values"]
        question = "<image>" * count + "\nWhat is there?"
        expected = model.chat(tokenizer, tiles, question, OPTIONS, num_patches_list=[1] * count)
        assert stream.ask("What is there?", OPTIONS) == expected
    other = model.chat(tokenizer, tiles.flip(0), question, OPTIONS, num_patches_list=[1] * count)
    assert other != expected  # the frames matter


@pytest.mark.parametrize("kind", KINDS)
def test_questions_do_not_change_what_the_stream_goes_on_with(parts, kind):
    asked, silent = Stream(*parts[kind]), Stream(*parts[kind])
    for pixels in frames(3):
        asked.read(pixels)
        asked.ask("What is there?", OPTIONS)
        silent.read(pixels)
    assert (asked.tokens, asked.state.ids) == (silent.tokens, silent.state.ids)
    torch.testing.assert_close(asked.state.cache.tensors(), silent.state.cache.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_that_are_read_at_once_leave_what_frames_one_by_one_do(parts, kind):
    shown = frames(7)
    together, alone = Stream(*parts[kind]), after(Stream(*parts[kind]), shown)
    together.read(*shown[:5])
    together.read(*shown[5:])
    assert (together.frames, together.tokens) == (alone.frames, alone.tokens)
    torch.testing.assert_close(together.state.cache.tensors(), alone.state.cache.tensors(), rtol=1e-8, atol=1e-8)


def test_a_restart_forgets_a_loaded_conversation_too(parts, tmp_path):
    model, tokenizer, _ = parts["linear"]
    model.conversation(tokenizer).extend("One, two, three.").save(tmp_path / "state")
    shown = frames(2)
    loaded = Stream(*parts["linear"], restart=1, file=tmp_path / "state")
    assert len(loaded.state)
    after(loaded, shown)
    fresh = after(Stream(*parts["linear"]), shown[1:])
    torch.testing.assert_close(loaded.state.cache.tensors(), fresh.state.cache.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_forgets_all_frames_before_it(parts, kind):
    shown = frames(8)
    restarted = after(Stream(*parts[kind], restart=3), shown)  # anew at the 4th and the 7th
    fresh = after(Stream(*parts[kind]), shown[6:])
    torch.testing.assert_close(restarted.state.cache.tensors(), fresh.state.cache.tensors(), rtol=0, atol=0)
    assert restarted.frames == 8 and restarted.tokens > 8 * TOKENS_PER_FRAME


def test_frames_are_numbered_where_their_text_says_so(parts):
    stream = after(Stream(*parts["hybrid"], frame_text="Frame{number}: <image>\n"), frames(2))
    assert "Frame2: <img>" in stream.tokenizer.decode(stream.state.ids)
    with pytest.raises(ValueError, match="does not say <image> once"):
        Stream(*parts["hybrid"], frame_text="no frame")


def test_a_stream_changes_its_scene_now_and_then_and_is_the_same_for_the_same_seed():
    shown = list(islice(scenes("test", 0, 3, hold=5), 60))
    assert shown == list(islice(scenes("test", 0, 3, hold=5), 60))
    assert all(picture.grid == (1, 1) and picture.held_out for picture in shown)
    changes = sum(one != other for one, other in pairwise(shown))
    assert 4 <= changes <= 25
    assert ONE_PICTURE["count"](None, shown[:1])


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_clip_begins_again_when_it_ends_and_drops_nothing(clip):
    with Clip(clip) as source:
        shown = list(islice(source.frames(), 25))
        assert source.dropped == 0
    assert all(np.array_equal(shown[i], shown[i + 12]) for i in range(13))
    assert not np.array_equal(shown[0], shown[11])


def test_a_clip_in_real_time_drops_the_frames_that_came_while_nobody_looked(clip):
    with Clip(clip, fps=10) as source:
        begin, stream = time.perf_counter(), source.frames()
        next(stream)
        time.sleep(0.75)
        next(stream)
        assert source.dropped >= 5
        for _ in range(3):
            next(stream)
        # What was given or dropped is as much as the time that went by, across the clip's end.
        assert 4 + source.dropped <= 10 * (time.perf_counter() - begin) + 1


class SlowReader:
    """Decodes more slowly than the clip plays: 100 frames of each second, 20 ms each."""

    def frames(self, fps):
        for number in range(1000):
            time.sleep(0.02)
            yield SimpleNamespace(time=number / 100, pixels=number)

    def close(self):
        pass


def test_a_clip_whose_decoding_is_slower_than_real_time_goes_on_and_stops(clip, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_SEARCH", 0.1)
    stopping = threading.Event()
    with Clip(clip, fps=100, stopping=stopping) as source:
        monkeypatch.setattr(source, "reader", SlowReader())
        shown = list(islice(source.frames(), 12))
        assert source.dropped and shown == sorted(shown) and shown[-1] < 200
        monkeypatch.setattr(sources, "LONGEST_SEARCH", 1e9)
        timer = threading.Timer(0.5, stopping.set)
        timer.start()
        assert len(list(source.frames())) < 100
    timer.join()


def test_a_device_gives_its_newest_frames_until_it_ends():
    try:
        with Device("testsrc=size=32x16:rate=5:duration=2", "lavfi") as source:
            shown = list(source.frames())
            assert shown and all(pixels.shape == (16, 32, 3) for pixels in shown)
            assert len(shown) + source.dropped == 10
    except ValueError as error:
        if "lavfi" in str(error) and "no container format" in str(error):
            pytest.skip("this FFmpeg has no test source")
        raise


# --- the command -----------------------------------------------------------------------------------------------------


def test_it_watches_asks_and_saves(clip, tmp_path, capsys):
    state = tmp_path / "state"
    arguments = [
        str(clip),
        "--frames=14",
        "--ask=5:How many objects are there?",
        "--status-every=5",
        f"--state={state}",
    ]
    assert watch.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].strip() for line in lines if "KiB of state" in line] == [
        "frame 5",
        "frame 10",
        "frame 14",
    ]
    assert len({line.split("|")[2] for line in lines if "KiB of state" in line}) == 1
    question = lines.index("[frame 5] How many objects are there?")
    assert lines[question + 1].strip() and lines[-1] == f"saved to {state}"
    before = state.read_bytes()
    assert watch.main([str(clip), "--frames=1", f"--state={state}"]) == 0  # goes on
    assert state.read_bytes() != before


def test_the_end_of_input_ends_it_when_all_questions_are_answered(clip, capsys, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"What color is the star?\nHow many objects are there?")
    os.close(write)
    monkeypatch.setattr(watch.os, "read", lambda fd, size, read_from=os.read: read_from(read, size))
    assert watch.main([str(clip), "--ask=4:Is there a red star?"]) == 0
    output = capsys.readouterr().out
    assert "What color is the star?" in output and "How many objects are there?" in output
    assert "[frame 4] Is there a red star?" in output and output.splitlines()[-1].startswith("frame 4 |")


def test_the_last_frames_of_a_device_are_read_and_its_last_questions_answered(capsys, monkeypatch):
    class Ends(Clip):
        def frames(self):
            return islice(super().frames(), 5)

    monkeypatch.setattr(watch, "Clip", Ends)
    monkeypatch.setattr(watch, "read_questions", lambda questions: questions.put("What color is the star?"))
    assert watch.main(["--batch=4", "--ask=5:How many objects are there?"]) == 0
    output = capsys.readouterr().out
    assert "[frame 5] How many objects are there?" in output and output.splitlines()[-1].startswith("frame 5 |")


def test_sigterm_ends_it_in_order(tmp_path):
    state = tmp_path / "state"
    command = [sys.executable, "-m", "mmmamba.examples.streaming.watch", f"--state={state}", "--status-every=1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout.readline().startswith("frame 1 |")
        process.stdin.write("How many objects are there?\n")
        while not (line := process.stdout.readline()).startswith("[frame"):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors and "Fatal" not in errors
    assert output.splitlines()[-1] == f"saved to {state}" and state.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.mp4"], "nothing.mp4 does not exist"),
        ([__file__], "cannot be read as a video"),
        (["nothing", "--format=nonsense"], "cannot be opened"),
        (["--format=v4l2"], "give one, such as /dev/video0"),
        (["--fps=0"], "fps=0.0 is no number of frames"),
        (["--state=nowhere/state"], "make the folder"),
        (["--frame-text=frame"], "does not say <image> once"),
        (["--model=nowhere"], "nowhere"),
        (["--batch=4", "--restart=3"], "--batch 4 is more than --restart 3"),
    ],
)
def test_what_cannot_be_watched_is_said_in_one_sentence(arguments, said, capsys):
    assert watch.main([*arguments, "--frames=1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line


def test_a_question_without_its_frame_is_refused(capsys):
    with pytest.raises(SystemExit):
        watch.main(["--ask=Where is it?"])
    assert "is not N:question" in capsys.readouterr().err


def test_a_truncated_clip_ends_the_watch_in_a_sentence_and_keeps_the_state(clip, tmp_path, capsys):
    short = tmp_path / "short.mkv"
    write_clip(short, (Image.new("RGB", (48, 48), (9 * i, 0, 0)) for i in range(20)))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert watch.main([str(damaged), "--frames=40", f"--state={tmp_path / 'state'}"]) == 1
    assert "error: " in capsys.readouterr().err
