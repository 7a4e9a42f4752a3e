"""Watches a video that never ends, in constant memory, and answers questions about it while it goes on.

    python -m mmmamba.examples.streaming.watch                       # a made clip, again and again; type a question
    python -m mmmamba.examples.streaming.watch film.mp4 --fps 2      # as it plays: two frames of each second
    python -m mmmamba.examples.streaming.watch /dev/video0 --format v4l2 --fps 5
    python -m mmmamba.examples.streaming.watch --frames 300 --ask "100:How many objects are there?"

Ctrl-C, SIGTERM and the end of input (Ctrl-D) end it; `--state FILE` then saves what was seen.
"""

import argparse
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from mmmamba.cli.arguments import device, path_or_address, positive
from mmmamba.cli.env import usable_device
from mmmamba.cli.load import load_model
from mmmamba.conversion.publish import check_model_folder
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.examples.shapes.folder import SHIPPED
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
from mmmamba.video_reading_mmmamba import check_sampling

from .scenes import FRAME, pictures
from .sources import Clip, Device
from .stream import Stream


def _question_at(text: str) -> tuple[int, str]:
    """`N:question` as a number and a text, from the command line."""
    number, _, question = text.partition(":")
    if not question.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not N:question, such as 100:How many objects are there?")
    return positive(number), question.strip()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba.examples.streaming.watch", description="Watch a video that never ends."
    )
    parser.add_argument(
        "clip",
        nargs="?",
        type=path_or_address,
        metavar="CLIP",
        help="video, watched again and again (default: a made one); with --format, a device or an address",
    )
    parser.add_argument("--model", type=Path, default=SHIPPED / "linear", help="default: the small linear")
    parser.add_argument("--format", help="FFmpeg's name of the device that CLIP is, such as v4l2 or rtsp")
    parser.add_argument("--fps", type=float, help="in real time, so many frames of each second (default: all frames)")
    parser.add_argument("--frames", type=positive, metavar="N", help="stop after so many frames")
    parser.add_argument(
        "--ask",
        type=_question_at,
        action="append",
        default=[],
        metavar="N:QUESTION",
        help="ask after frame N; may be repeated",
    )
    parser.add_argument(
        "--restart", type=positive, metavar="N", help="forget everything (--state, too) after every N frames"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="frames to read at once: more in a second, but later"
    )
    parser.add_argument(
        "--frame-text", default=FRAME, help=f"what stands for a frame, {{number}} being its number (default: {FRAME})"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="continued if it exists, saved at the end")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="longest answer (default: 64)")
    parser.add_argument("--status-every", type=positive, default=100, metavar="N", help="frames (default: 100)")
    device(parser)
    return parser


class _Stop(StoppingCriteria):
    """Ends an answer when the watching is to end."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Screen:
    """Prints status lines and answers. On a terminal the status stands above the line that one types on."""

    def __init__(self):
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def prompt(self) -> None:
        if self.is_terminal:
            print("\n> ", end="", flush=True)

    def status(self, text: str) -> None:
        if self.is_terminal:  # save the cursor, go up, write over that line, go back
            width = shutil.get_terminal_size().columns - 1
            print(f"\x1b7\x1b[A\r\x1b[K{text[:width]}\x1b8", end="", flush=True)
        else:
            print(text, flush=True)

    def clear_prompt(self) -> None:
        if self.is_terminal:
            print("\r\x1b[K", end="")


def read_questions(questions: queue.SimpleQueue) -> None:
    """Puts lines of standard input into a queue, and None when it ends."""
    rest = b""
    # Not sys.stdin: a thread that waits in its buffer cannot be left behind when the process ends.
    with suppress(OSError):  # it may be closed
        while data := os.read(0, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                questions.put(line.decode(errors="replace").strip())
    questions.put(rest.decode(errors="replace").strip())
    questions.put(None)


@contextmanager
def _stopped_by_signals(event: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set the event; the second one ends the process as usual."""
    before = {}

    def stop(number, frame):
        event.set()
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> None:
    """Watches until something ends it. Raises ValueError for a model, a clip or a file that cannot be used."""
    check_model_folder(args.model)
    check_sampling(None, args.fps)
    if args.state is not None and not args.state.resolve().parent.is_dir():
        raise ValueError(f"--state {args.state} is in a folder that does not exist; make the folder.")
    if args.clip is None and args.format is not None:
        raise ValueError(f"--format {args.format} says how to open CLIP; give one, such as /dev/video0.")
    if args.restart is not None and args.batch > args.restart:
        raise ValueError(f"--batch {args.batch} is more than --restart {args.restart}; give at most as many.")
    stopping, screen = threading.Event(), Screen()
    with tempfile.TemporaryDirectory(prefix="mmmamba-") as folder, _stopped_by_signals(stopping):
        path = args.clip
        if path is None:
            path = Path(folder) / "clip.mp4"
            write_clip(path, pictures(count=300, hold=15))
        with (
            Device(path, args.format, args.fps, stopping) if args.format else Clip(path, args.fps, stopping) as source
        ):
            where = usable_device(args.device)
            model = load_model(args.model, where, torch.float32 if where.type == "cpu" else "auto")
            tokenizer = MmMambaTokenizerFast.from_pretrained(args.model)
            processor = MmMambaVideoProcessor.from_pretrained(args.model)
            stream = Stream(model, tokenizer, processor, args.frame_text, args.restart, args.state)
            try:
                watch(args, stream, source, stopping, screen)
            finally:
                screen.clear_prompt()
                if args.state is not None:
                    stream.state.save(args.state)
                    print(f"saved to {args.state}")


def watch(args: argparse.Namespace, stream: Stream, source, stopping: threading.Event, screen: Screen) -> None:
    """Reads frames, answers questions between them, prints the status."""
    questions = queue.SimpleQueue()
    threading.Thread(target=read_questions, args=(questions,), daemon=True).start()
    due = deque(sorted(args.ask))
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    options["stopping_criteria"] = StoppingCriteriaList([_Stop(stopping)])
    streamer = TextStreamer(stream.tokenizer, skip_prompt=True, skip_special_tokens=True)
    last_time, last_frames, ended = time.perf_counter(), 0, False

    def status() -> None:
        nonlocal last_time, last_frames
        now = time.perf_counter()
        rate = (stream.frames - last_frames) / (now - last_time)
        last_time, last_frames = now, stream.frames
        dropped = f", {source.dropped:,} dropped" if source.dropped else ""
        screen.status(
            f"frame {stream.frames:,}{dropped} | {rate:.1f} frames/s | {stream.nbytes / 1024:,.1f} KiB of state | "
            f"{stream.tokens:,} tokens read"
        )

    def answer(question: str) -> None:
        screen.clear_prompt()
        print(f"[frame {stream.frames:,}] {question}\n  ", end="", flush=True)
        stream.ask(question, options, streamer)
        screen.prompt()

    def read_and_answer() -> None:
        nonlocal ended
        if waiting:
            stream.read(*waiting)
            waiting.clear()
        if stream.frames - last_frames >= args.status_every:
            status()
        while due and due[0][0] <= stream.frames:
            answer(due.popleft()[1])
        while not questions.empty():
            if (question := questions.get()) is None:
                ended = args.frames is None
            elif question:
                answer(question)

    screen.prompt()
    waiting = []
    for pixels in source.frames():
        if stopping.is_set():
            break
        waiting.append(pixels)
        if len(waiting) < args.batch and stream.frames + len(waiting) != args.frames:
            continue
        read_and_answer()
        if (ended and not due) or stream.frames == args.frames:
            break
    else:  # a device has ended, perhaps within a batch
        if not stopping.is_set():
            read_and_answer()
    if stream.frames > last_frames:
        status()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 however the watching was ended, 1 after an error in one sentence."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
