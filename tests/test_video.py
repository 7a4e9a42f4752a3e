"""Videos: the right frames of every format, InternVL's prompt, constant memory, a sentence for what cannot be read."""

import os
import sys
import threading
import tracemalloc
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from mmmamba.cli.main import main
from mmmamba.examples.shapes.clip import ENCODERS, write_clip
from mmmamba.examples.shapes.folder import SHIPPED, make_processor
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import encode_conversation
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
from mmmamba.video_reading_mmmamba import VideoReader, sample_video


av = pytest.importorskip("av")

QUESTION = "Where is the red star?"
SIZE = {"height": 16, "width": 16}
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 frames in 4 seconds."""
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(file)
    return file


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def load(name):
    return MmMambaForConditionalGeneration.from_pretrained(SHIPPED / name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return load("hybrid")


def decoded(file):
    """All frames, by PyAV's plainest loop."""
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def changing(count, size=16):
    """Pictures of which no two are alike."""
    for number in range(count):
        yield Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def tiles_of(video, **options):
    return MmMambaVideoProcessor(size=SIZE)(video, return_tensors="pt", **options)["pixel_values"]


# --- frames ----------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_internvls_examples():
    sample = MmMambaVideoProcessor().sample_frames
    # int(part / 2 + round(part * i)) with part = (frames - 1) / segments, as InternVL's `get_index` has it.
    assert sample(VideoMetadata(100)).tolist() == [6, 18, 31, 43, 56, 68, 80, 93]
    assert sample(VideoMetadata(9), num_frames=2).tolist() == [2, 6]
    assert sample(VideoMetadata(1000), num_frames=1).tolist() == [499]
    # Where that would show a frame twice, or there are fewer than eight: every frame.
    assert sample(VideoMetadata(8)).tolist() == list(range(8))
    assert sample(VideoMetadata(3)).tolist() == [0, 1, 2]
    assert len(sample(VideoMetadata(300, fps=30.0), fps=2)) == 20
    assert len(MmMambaVideoProcessor(fps=1).sample_frames(VideoMetadata(300, fps=30.0))) == 10
    assert sample(VideoMetadata(3, fps=30.0), fps=1).tolist() == [1]
    for total in range(2, 60):
        for count in range(1, total):
            assert (np.diff(sample(VideoMetadata(total), num_frames=count)) > 0).all()


@pytest.mark.parametrize("suffix", ENCODERS)
def test_sampled_frames_are_the_right_ones_in_every_format(suffix, tmp_path):
    file = tmp_path / f"clip{suffix}"
    write_clip(file, changing(40), zoom=2)
    every = decoded(file)
    assert len(every) == 40
    chosen = [3, 4, 15, 27, 39]
    pixels, metadata = sample_video(file, lambda metadata: np.array(chosen))
    assert all((frame == every[index]).all() for frame, index in zip(pixels, chosen, strict=True))
    assert (metadata.total_num_frames, metadata.fps) == (40, 10.0)
    with VideoReader(file) as video:
        read = list(video.frames(fps=2))
        assert [frame.index for frame in read] == [0, 5, 10, 15, 20, 25, 30, 35]
        assert [round(frame.time, 3) for frame in read] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
        assert all((frame.pixels == every[frame.index]).all() for frame in read)
        assert len(list(video.frames())) == len(list(video.frames(fps=1000))) == 40  # twice: it begins again


class Counting:
    """A container of PyAV that counts the frames that it decodes."""

    def __init__(self, container):
        self.container, self.decoded = container, 0

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame

    def __getattr__(self, name):
        return getattr(self.container, name)


def test_only_what_is_needed_is_decoded(tmp_path):
    file = tmp_path / "long.mp4"
    write_clip(file, changing(240), zoom=1)
    with VideoReader(file) as video:
        video._container = Counting(video._container)
        pixels = video.sample(lambda metadata: np.array([10, 230]))
        assert video._container.decoded < 60  # of 231: it begins at the keyframe before each
    every = decoded(file)
    assert (pixels[0] == every[10]).all() and (pixels[1] == every[230]).all()


def test_videos_of_phones_are_turned_upright(tmp_path, clip):
    content = bytearray(clip.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one, minus_one = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    assert content[matrix : matrix + 4] == one
    # (x, y) is shown at (-y, x): a quarter turn to the right.
    content[matrix : matrix + 36] = b"".join((zero, one, zero, minus_one, zero, zero, zero, zero, last))
    (tmp_path / "phone.mp4").write_bytes(content)
    with VideoReader(tmp_path / "phone.mp4") as video:
        frame = next(video.frames())
    assert (frame.pixels == np.rot90(decoded(clip)[0], -1)).all()


def test_a_video_may_be_given_in_every_form(tmp_path):
    expected = MmMambaImageProcessor(size=SIZE, max_patches=1)(list(FRAMES), return_tensors="pt")["pixel_values"]
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number:02}.png")
    files = sorted(tmp_path.iterdir())
    channels_first = FRAMES.transpose(0, 3, 1, 2)
    for video in (FRAMES, torch.from_numpy(FRAMES), channels_first, list(FRAMES), pictures, FRAMES[None], [files]):
        assert torch.equal(tiles_of(video), expected)
    assert torch.equal(tiles_of([pictures, FRAMES]), torch.cat([expected, expected]))
    assert torch.equal(tiles_of(FRAMES, num_frames=4), expected[[1, 4, 7, 9]])
    with_rate = {"video_metadata": [{"total_num_frames": 12, "fps": 4.0}], "fps": 1}
    assert torch.equal(tiles_of(FRAMES, **with_rate), tiles_of(FRAMES, num_frames=3))
    assert torch.equal(tiles_of(FRAMES, do_sample_frames=True), tiles_of(FRAMES, num_frames=8))


def test_frames_may_have_several_tiles(clip):
    inputs = MmMambaVideoProcessor(size=SIZE)(
        [np.zeros((3, 16, 32, 3), np.uint8), clip], max_patches=2, use_thumbnail=True, return_tensors="pt"
    )
    assert inputs["num_frames"].tolist() == [3, 8] and inputs["num_patches"].tolist() == [3] * 3 + [1] * 8
    assert inputs["pixel_values"].shape == (17, 3, 16, 16)


def test_a_video_may_be_an_address(clip):
    handler = partial(
        type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=clip.parent
    )
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        assert torch.equal(tiles_of(address + clip.name), tiles_of(clip))
        with pytest.raises(ValueError, match="cannot be fetched"):
            tiles_of(address + "missing.mp4")
    finally:
        server.shutdown()
        server.server_close()


# --- prompts ---------------------------------------------------------------------------------------------------------


def ask(processor, content, **options):
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", **options,
    )  # fmt: skip


def test_messages_processor_and_chat_show_a_video_alike(clip, processor, model):
    text = {"type": "text", "text": QUESTION}
    inputs = ask(processor, [{"type": "video", "path": str(clip)}, text])
    tiles = processor.video_processor(clip, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], tiles) and len(tiles) == 8

    upstream = "".join(f"Frame{number}: <image>\n" for number in range(1, 9)) + QUESTION
    ids = encode_conversation(processor.tokenizer, upstream, None, [1] * 8, 4)
    assert inputs["input_ids"].tolist() == [ids]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, len(ids) :]
    (answer,) = processor.batch_decode(answer, skip_special_tokens=True)
    assert answer == model.chat(processor.tokenizer, tiles, upstream, {"max_new_tokens": 8}, num_patches_list=[1] * 8)
    assert answer == "bottom right"  # where the star ends

    for key, video in (("video", clip), ("url", str(clip))):
        assert torch.equal(ask(processor, [{"type": "video", key: video}, text])["input_ids"], inputs["input_ids"])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": f"<video>\n{QUESTION}"}], add_generation_prompt=True
    )
    by_hand = processor(text=prompt, videos=clip, return_tensors="pt")
    assert torch.equal(by_hand["input_ids"], inputs["input_ids"])
    three = ask(processor, [{"type": "video", "path": clip}, text], processor_kwargs={"num_frames": 3})
    assert len(three["pixel_values"]) == 3


def test_a_template_writes_a_video_as_special_tokens_only(processor):
    for tokenize in (False, True):
        written = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}], tokenize=tokenize
        )
        if tokenize:
            written = written["input_ids"]
            begin, end = processor.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
            assert written[written.index(begin) + 1] == end
        else:
            assert "<img></img>\n?" in written


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_tiles_of_pictures_and_videos_stand_in_the_order_of_the_prompt(return_tensors, processor):
    def shade(level):
        return Image.new("RGB", (48, 48), (level, level, level))

    inputs = processor(
        text=["<image><video> and", "<video>\n<image>, <image>"],
        images=[shade(10), shade(50), shade(60)],
        videos=[[shade(20), shade(30)], np.full((1, 48, 48, 3), 40, np.uint8)],
        padding=True,
        return_tensors=return_tensors,
    )
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    levels = [round((float(tile[0].mean()) * std + mean) * 255) for tile in inputs["pixel_values"]]
    assert levels == [10, 20, 30, 40, 50, 60]
    counts = [list(row).count(processor.image_token_id) for row in inputs["input_ids"]]
    assert counts == [3 * 4, 3 * 4]
    one = processor(text=["a <video>", "b", "<video>"], videos=[[FRAMES], [], [list(FRAMES[:2])]], return_tensors=None)
    assert len(one["pixel_values"]) == 14


def test_offsets_of_tokens_behind_a_video_are_those_of_the_prompt(processor):
    prompt = "Is <video> a <image> film?"
    inputs = processor(
        text=prompt, images=FRAMES[0, :, :20], videos=FRAMES[:2], return_offsets_mapping=True, add_special_tokens=False
    )
    (ids,), (offsets,) = inputs["input_ids"], inputs["offset_mapping"]
    assert offsets.count((3, 10)) >= 2 * (2 + 4) and offsets.count((13, 20)) == 2 + 4
    assert prompt[offsets[-1][0] : offsets[-1][1]].strip() in "film?" and offsets[-1][1] == len(prompt)
    begin = processor.tokenizer.convert_tokens_to_ids("<img>")
    assert [offsets[i] for i, token in enumerate(ids) if token == begin] == [(3, 10), (3, 10), (13, 20)]


def test_typed_video_placeholders_are_text(clip, processor):
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "<video> <img></img> ?"}]
    ids = ask(processor, content)["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<img>")) == 8
    assert "<video> <img></img>" in processor.decode(ids)


def test_folders_load_and_save_the_video_processor(tmp_path, processor, clip):
    expected = tiles_of(clip, size={"height": 48, "width": 48}, num_frames=5)
    for name in ("hybrid", "linear", "teacher"):
        loaded = AutoVideoProcessor.from_pretrained(SHIPPED / name, trust_remote_code=True)
        assert torch.equal(loaded(clip, num_frames=5, return_tensors="pt")["pixel_values"], expected)
    processor = make_processor()
    processor.video_processor = MmMambaVideoProcessor(size=SIZE, fps=2, max_patches=3)
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).video_processor
    assert (saved.fps, saved.num_frames, saved.max_patches, dict(saved.size)["height"]) == (2, None, 3, 16)
    saved.save_pretrained(tmp_path / "alone")
    assert AutoVideoProcessor.from_pretrained(tmp_path / "alone", trust_remote_code=True).fps == 2


def test_a_folder_without_settings_for_videos_gives_one_tile_for_each_frame(tmp_path):
    MmMambaImageProcessor(size=SIZE, max_patches=6).save_pretrained(tmp_path)
    loaded = MmMambaVideoProcessor.from_pretrained(tmp_path)
    assert loaded(np.zeros((2, 16, 32, 3), np.uint8), return_tensors="pt")["pixel_values"].shape == (2, 3, 16, 16)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_video_of_any_length_is_read_in_constant_memory(tmp_path, processor):
    file = tmp_path / "long.mp4"
    write_clip(file, changing(100, size=128), zoom=1)
    frame = 128 * 128 * 3
    with VideoReader(file) as video:
        next(video.frames())
        tracemalloc.start()
        for _ in video.frames():
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * frame  # of 100

    model, sizes = load("linear"), []
    state = model.conversation(processor.tokenizer)
    with VideoReader(file) as video:
        for number, frame in enumerate(video.frames(fps=1), 1):
            tiles = processor.video_processor([frame.pixels], return_tensors="pt")["pixel_values"]
            state.extend(f"Frame{number}: <image>\n", tiles)
            sizes.append(state.nbytes)
    assert len(sizes) == 10 and len(set(sizes)) == 1


def test_a_question_may_be_asked_at_any_moment(clip, processor, model):
    """And the state has read what the processor would have written."""
    state = model.conversation(processor.tokenizer)
    tiles = processor.video_processor(clip, return_tensors="pt")["pixel_values"]
    for number, tile in enumerate(tiles, 1):
        state.extend(f"Frame{number}: <image>\n", tile[None])
        if number == 2:
            early = state.fork().ask(QUESTION, {"max_new_tokens": 8})
    for shown, answer in ((2, early), (8, state.fork().ask(QUESTION, {"max_new_tokens": 8}))):
        question = "".join(f"Frame{number}: <image>\n" for number in range(1, shown + 1)) + QUESTION
        counts = [1] * shown
        expected = model.chat(
            processor.tokenizer, tiles[:shown], question, {"max_new_tokens": 8}, num_patches_list=counts
        )
        assert answer == expected


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_videos(clip, capsys):
    chat = ["chat", "--video", str(clip)]
    assert main([*chat, QUESTION]) == 0
    out = capsys.readouterr().out
    assert "clip.mp4 (192 x 192 pixels, 4.0 s): read 8 of 40 frames" in out and out.endswith("\nbottom right\n")
    assert main([*chat, "--fps", "1", QUESTION]) == 0
    assert "read 4 of 40 frames" in capsys.readouterr().out
    picture = ["--image", str(SHIPPED / "picture.png")]
    assert main([*chat, *chat[1:], *picture, "--num-frames", "2", QUESTION]) == 0
    assert capsys.readouterr().out.count("read 2 of 40 frames") == 2


def test_videos_can_be_shown_while_chatting_and_stopped(clip, tmp_path, capsys, monkeypatch):
    lines = iter([f"/video {tmp_path / 'missing.mp4'}", f"/video {clip}", QUESTION, f"/video {clip}", QUESTION, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "stdin", type("Keyboard", (), {"isatty": lambda self: True})())
    asked, process = [], MmMambaVideoProcessor.__call__

    def interrupted(self, *arguments, **options):
        asked.append(1)
        if len(asked) == 8 + 4:
            raise KeyboardInterrupt
        return process(self, *arguments, **options)

    monkeypatch.setattr(MmMambaVideoProcessor, "__call__", interrupted)
    assert main(["chat", "--image", str(SHIPPED / "picture.png")]) == 0
    out = capsys.readouterr().out
    assert "missing.mp4 does not exist" in out and "read 8 of 40 frames\nbottom right" in out
    assert "read 3 of 40 frames (interrupted)\n" in out


def test_the_demonstration_offers_a_video_that_it_has_made(capsys):
    assert main(["chat"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "mmmamba chat --video" in line)
    assert len(decoded(line.split()[3])) == 40


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_files(folder, clip):
    content = clip.read_bytes()
    (folder / "text.mp4").write_text("not a video\n" * 40)
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n")
    (folder / "clip.mp4").write_bytes(content)
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    write_clip(folder / "whole.avi")
    whole = (folder / "whole.avi").read_bytes()
    (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


def test_files_that_are_no_whole_video_are_refused_in_a_sentence(clip, tmp_path, processor, capsys, monkeypatch):
    bad_files(tmp_path, clip)
    monkeypatch.chdir(tmp_path)  # where a playlist would look for files
    for name, reason in {
        "missing.mp4": "does not exist",
        "nul\0.mp4": "does not exist",
        "": "is no file but a folder",
        "text.mp4": "cannot be read as a video",
        "empty.mp4": "is empty",
        "cut.mp4": "cannot be read as a video",
        "cut.avi": "is truncated: it has",
        "list.mp4": "cannot be read as a video",
        "concat.mp4": "cannot be read as a video",
        "pipe.mp4": "is no file but a folder, pipe or device",
        "sound.wav": "has no pictures",
    }.items():
        file = str(tmp_path / name)
        with pytest.raises(ValueError, match=reason) as caught:
            processor(text="<video>", videos=file)
        assert "\n" not in str(caught.value) and name.replace("\0", "\\x00") in str(caught.value)
        with pytest.raises(ValueError, match=reason), VideoReader(file) as video:
            list(video.frames())
    assert main(["chat", "--video", str(tmp_path / "text.mp4"), "?"]) == 1
    assert capsys.readouterr().err.startswith(f"error: --video {tmp_path / 'text.mp4'} cannot be read as a video")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_frames": 0}, "num_frames=0 is no number of frames"),
        ({"num_frames": -1}, "num_frames=-1 is no number of frames"),
        ({"num_frames": 2.5}, "num_frames=2.5 is no number"),
        ({"num_frames": 41}, "num_frames=41 is more than the 40 frames"),
        ({"fps": 0}, "fps=0 is no number"),
        ({"fps": float("nan")}, "fps=nan is no number"),
        ({"fps": 1, "num_frames": 4}, "num_frames=4 and fps=1 are both given"),
    ],
)
def test_numbers_of_frames_that_cannot_be_had_are_refused(options, reason, clip, processor):
    with pytest.raises(ValueError, match=reason):
        processor(text="<video>", videos=clip, **options)
    with pytest.raises(ValueError, match=reason):
        tiles_of(clip, **options)
    with pytest.raises(ValueError, match=reason):
        ask(processor, [{"type": "video", "path": clip}], processor_kwargs=options)


@pytest.mark.parametrize(
    ("videos", "options", "reason"),
    [
        ([], {}, "has no frames"),
        (FRAMES[:0], {}, "has no frames"),
        (FRAMES[0], {}, r"An array of shape \(20, 30, 3\) is no video"),
        (5, {}, "5 is no video"),
        ([FRAMES[0], FRAMES[0, :9]], {}, "differ in size"),
        (FRAMES, {"fps": 1}, "needs the video's own rate"),
        (FRAMES, {"fps": 1, "video_metadata": {"total_num_frames": 99, "fps": 9.0}}, "has total_num_frames=99"),
    ],
)
def test_frames_that_are_no_video_are_refused(videos, options, reason):
    with pytest.raises(ValueError, match=reason):
        tiles_of(videos, **options)


def test_videos_and_placeholders_must_agree(clip, processor):
    for text, videos, reason in (
        ("no place", clip, "has 0 <video> placeholders but there are 1 videos"),
        ("<video><video>", clip, "has 2 <video> placeholders but there are 1 videos"),
        ("<image>", clip, "has 1 <image> placeholders but there are 0 pictures"),
        (["<video>", "b"], [[], [clip]], "has 1 <video> placeholders but 0 videos"),
        (["<video>", "b"], [[clip]], "There are 1 lists of videos for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor(text=text, videos=videos)
    with pytest.raises(ValueError, match="image tokens of a prompt"):
        processor(text="<video>", videos=clip, truncation=True, max_length=20)


def test_without_a_decoder_it_says_what_to_install(clip, monkeypatch):
    for name in ("av", "decord", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    for read in (tiles_of, VideoReader):
        with pytest.raises(ValueError, match="pip install av"):
            read(clip)


def test_without_pyav_transformers_readers_are_used(clip, monkeypatch):
    decord = pytest.importorskip("decord")
    expected = tiles_of(clip)
    monkeypatch.setitem(sys.modules, "av", None)
    assert decord and torch.equal(tiles_of(Path(clip)), expected)
