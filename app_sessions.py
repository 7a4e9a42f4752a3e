"""What the page (`app.py`) does without Gradio: opens uploads, and runs the conversations of several browser tabs.

In a Space this file stands beside `app.py`, without the package: what it needs of the model's code it finds where the
model's classes come from.
"""

import html
import importlib
import logging
import mimetypes
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteriaList


logger = logging.getLogger(__name__)
PIECE = 4000  # characters of a document that are read at once
MOST_BRANCHES = 8
PICTURE_SIZE = 512  # longest side of a picture in the chat
KEEP_IDLE, KEEP_CLOSED = 3600, 300  # seconds that a conversation outlives its last use, and its browser tab
MOST_SESSIONS = 1000


# --- what is uploaded ------------------------------------------------------------------------------------------------


@dataclass
class Upload:
    """A file that somebody gave, opened and checked.

    Attributes:
        name: Of the file.
        thumbnail: What the chat shows of it; None for a document.
        parts: What the model reads, piece by piece: a text and its picture, as `ConversationState.extend` takes them.
    """

    name: str
    thumbnail: Image.Image | None
    parts: list[tuple[str, Image.Image | torch.Tensor | None]]


class Reader:
    """Opens uploads as a model reads them.

    Args:
        model, tokenizer, video_processor: As `app.load` returns them.
    """

    def __init__(self, model, tokenizer, video_processor):
        def module_of(owner, name: str):
            """Transformers gives the code of each class a package of its own, with those modules that it imports."""
            return importlib.import_module(f"{type(owner).__module__.rpartition('.')[0]}.{name}_mmmamba")

        self.tokenizer = tokenizer
        self.as_text = partial(module_of(model, "chat_template").as_text, tokenizer=tokenizer)
        self._frames = video_processor
        if video_processor is not None:
            self._read_image = module_of(model, "image_reading").read_image
            self._open_video = module_of(video_processor, "video_reading").VideoReader

    def open(self, path: str | Path, num_frames: int) -> Upload:
        """A picture, a video (evenly spaced frames of it) or a text in UTF-8.

        Raises:
            ValueError: if it is none of them, or damaged, or no text for a model that reads text only.
        """
        path, video = Path(path), partial(self._video, num_frames=num_frames)
        kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
        if self._frames is None:
            if kind in ("image", "video"):
                raise ValueError(f"{path.name} is no text, and this model reads text only; give texts in UTF-8.")
            return self._document(path)
        kinds = {"image": [self._picture], "video": [video], "text": [self._document]}
        errors = []
        for opening in kinds.get(kind, [self._document, self._picture, video]):
            try:
                return opening(path)
            except ValueError as error:
                errors.append(str(error).replace(str(path), path.name))
        raise ValueError(errors[0])

    def _picture(self, path: Path) -> Upload:
        image = self._read_image(path)
        return Upload(path.name, image, [("", image)])

    def _video(self, path: Path, num_frames: int) -> Upload:
        with self._open_video(path) as video:
            frames = video.sample(partial(self._frames.sample_frames, num_frames=num_frames))
        tiles = self._frames([frames], return_tensors="pt")
        each = tiles["pixel_values"].split(tiles["num_patches"].tolist())
        parts = [(f"Frame{number}: <image>\n", frame) for number, frame in enumerate(each, 1)]
        return Upload(path.name, contact_sheet(frames), parts)

    def _document(self, path: Path) -> Upload:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path.name} is no picture, no video and no text in UTF-8 ({error.reason} at byte {error.start}); "
                "convert it to one of them."
            ) from None
        if not text.strip():
            raise ValueError(f"{path.name} is empty; give a text with words in it.")
        # What looks like a placeholder in a document is text.
        text = text.replace("\r\n", "\n").rstrip() + "\n\n"
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        return Upload(path.name, None, [(self.as_text(piece), None) for piece in pieces])


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Frames of a video, (frames, height, width, 3), side by side in rows of four."""
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((PICTURE_SIZE // 4, PICTURE_SIZE // 4))
    (width, height), columns = images[0].size, min(4, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


# --- conversations ---------------------------------------------------------------------------------------------------


def message(role: str, text: str, title: str | None = None) -> dict:
    """A message of plain text as Gradio's Chatbot takes it, which would take HTML without Markdown, too."""
    text, title = html.escape(text, quote=False), html.escape(title, quote=False) if title else None
    content = [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": content} | ({"metadata": {"title": title}} if title else {})


class ModelThread:
    """Runs turns one step at a time, each in its turn: a long document keeps nobody waiting longer than a piece."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def start(self, turn: "Turn") -> None:
        self._executor.submit(self._step, turn.steps())

    def _step(self, steps: Iterator[None]) -> None:
        for _ in steps:
            self._executor.submit(self._step, steps)
            return


@dataclass
class Branch:
    """A conversation with what the page shows of it.

    Attributes:
        name: Shown to choose it.
        state: The model's `ConversationState`.
        messages: Of the chat, as Gradio's Chatbot takes them.
        size: Tokens read, and bytes of states and of keys and values, when the model last read something.
    """

    name: str
    state: object
    messages: list[dict] = field(default_factory=list)
    size: tuple[int, int, int] = (0, 0, 0)

    def measure(self) -> None:
        tensors = self.state.cache.tensors()
        fixed = sum(x.nbytes for name, x in tensors.items() if name.endswith("_state"))
        self.size = (len(self.state), fixed, sum(x.nbytes for x in tensors.values()) - fixed)


class Turn:
    """What the model reads for a question, and its answer, which grows.

    Attributes:
        activity: What it does now, in words.
        share: How much of the uploads was read, from 0 to 1.
        finished: Set when there is no more to come.
        stop: Set by whoever wants no more.
        message: Of the chat: the answer when it is finished, or why there is none.
    """

    def __init__(self, branch: Branch, uploads: list[Upload], question: str, options: dict, reader: Reader):
        self.branch, self.uploads, self.question, self.options = branch, uploads, question, options
        self.reader = reader
        self.activity, self.share, self.message = "waiting for its turn", 0.0, message("assistant", "")
        self.stop, self.finished = threading.Event(), threading.Event()
        self._ids: list[int] = []
        self._is_prompt = True

    def steps(self) -> Iterator[None]:
        """Does all of it, a step between two yields; runs in the model's thread."""
        try:
            yield from self._read()
            if self.question and not self.stop.is_set():
                self.activity = "answering"
                self.message |= message("assistant", self._answer())
            elif self.stop.is_set():
                self.message |= message("assistant", "Stopped before all was read.")
            else:
                self.message |= message("assistant", "Read. Ask about it.")
        except Exception as error:  # a device may be out of memory; the page goes on
            if not isinstance(error, ValueError):
                logger.exception("a turn failed")
            reason = " ".join(str(error).split()) or type(error).__name__
            self.message |= message("assistant", f"{reason}\n\nAsk again, or go on.", "Not answered")
        finally:
            self.uploads = []
            try:
                self.branch.measure()
            finally:
                self.finished.set()

    def _read(self) -> Iterator[None]:
        state, total = self.branch.state, sum(len(upload.parts) for upload in self.uploads)
        done = 0
        for upload in self.uploads:
            for text, picture in upload.parts:
                if self.stop.is_set():
                    return
                self.activity, self.share = f"reading {upload.name}", done / total
                state.extend(text, picture)
                done += 1
                self.branch.measure()
                yield

    def _answer(self) -> str:
        options = self.options | {"stopping_criteria": StoppingCriteriaList([self._is_stopped])}
        return self.branch.state.ask(self.reader.as_text(self.question), options, streamer=self)

    def _is_stopped(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)

    # As a streamer of Transformers it gets the prompt, then one token after another.

    def put(self, ids: torch.Tensor) -> None:
        if not self._is_prompt:
            self._ids += ids.flatten().tolist()
        self._is_prompt = False

    def end(self) -> None:
        pass

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.reader.tokenizer.decode(list(self._ids), skip_special_tokens=True).rstrip("\ufffd")


class Session:
    """What one browser tab has: a conversation and its forks.

    Attributes:
        branches: Of the conversation; `branch` is the one shown.
        turn: The last one, or None.
        expires: When it is forgotten, by `time.monotonic`.
        is_closed: Whether its tab was closed since it was used last.
    """

    def __init__(self, model, reader: Reader):
        self.model, self.reader = model, reader
        self.expires, self.is_closed = 0.0, False
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="mmmamba-page-")
        self._count = 0
        self.turn: Turn | None = None
        self.branches: list[Branch] = []
        self.new()

    @property
    def busy(self) -> bool:
        return self.turn is not None and not self.turn.finished.is_set()

    def check_idle(self) -> None:
        """Raises ValueError while an answer is under way."""
        if self.busy:
            raise ValueError("An answer is under way; wait for its end, or stop it.")

    def begin(self, uploads: list[Upload], question: str, options: dict) -> Turn:
        """A new turn, to be run by a `ModelThread`.

        Raises:
            ValueError: if another is under way, or there is nothing to read and no question.
        """
        question = question.strip()
        if not uploads and not question:
            raise ValueError("There is no question; type one, or add a file.")
        with self._lock:
            self.check_idle()
            said = message("user", "\n\n".join([*(x.name for x in uploads if not x.thumbnail), question]))
            shown = [{"path": self._saved(x.thumbnail), "alt_text": x.name} for x in uploads if x.thumbnail]
            said["content"][:0] = shown
            self.turn = Turn(self.branch, uploads, question, options, self.reader)
            self.branch.messages += [said, self.turn.message]
            return self.turn

    def _saved(self, picture: Image.Image) -> str:
        picture = picture.copy()
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        self._count += 1
        path = Path(self._folder.name, f"{self._count}.png")
        picture.save(path)
        return str(path)

    def new(self) -> None:
        """Forgets all branches and begins again."""
        self.branches = []
        self._add(self.model.conversation(self.reader.tokenizer), [])

    def fork(self) -> None:
        """Copies the conversation; the copy is shown."""
        self._check_branch_limit()
        self._add(self.branch.state.fork(), list(self.branch.messages))

    def choose(self, name: str) -> None:
        """Shows another branch."""
        self.branch = next((x for x in self.branches if x.name == name), self.branch)

    def save(self) -> str:
        """Writes the conversation to a file and returns its path."""
        path = Path(self._folder.name, f"conversation-{len(self.branch.state)}-tokens.safetensors")
        self.branch.state.save(path)
        return str(path)

    def load(self, path: str | Path) -> None:
        """Adds a saved conversation as a branch. Raises ValueError if it is none, or another model's."""
        self._check_branch_limit()
        path = Path(path)
        try:
            state = type(self.branch.state).load(path, self.model, self.reader.tokenizer)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from None
        text = transcript(state, self.reader.tokenizer)
        self._add(state, [message("assistant", text, f"Loaded from {path.name}")])

    def _check_branch_limit(self) -> None:
        if len(self.branches) >= MOST_BRANCHES:
            raise ValueError(f"There are {MOST_BRANCHES} branches, and no more fit; save this one and begin anew.")

    def _add(self, state, messages: list[dict]) -> None:
        number = 1 + max((int(x.name) for x in self.branches), default=0)
        self.branch = Branch(str(number), state, messages)
        self.branch.measure()
        self.branches.append(self.branch)

    def stop(self) -> None:
        """Ends the answer that is under way, if any."""
        if self.turn is not None:
            self.turn.stop.set()

    def close(self) -> None:
        """Frees what is kept."""
        self.stop()
        self._folder.cleanup()


def transcript(state, tokenizer, longest: int = 4000) -> str:
    """The end of what a state has read, as text in which each picture is one word."""
    pending = tokenizer(state.pending, add_special_tokens=False)["input_ids"] if state.pending else []
    text = tokenizer.decode([*state.ids[-4 * longest :], *pending])
    text = re.sub(r"(<img>)?(<IMG_CONTEXT>)+(</img>)? ?", "[picture]", text)
    text = re.sub(r"<\|im_start\|>\s*(\w+)\n?", r"\n\n\1: ", text)
    text = re.sub(r"<\|im_end\|>|</?s>", "", text).strip()
    return text if len(text) <= longest else f"… {text[-longest:]}"


class Sessions:
    """The sessions of all browser tabs, by Gradio's name of the tab.

    Args:
        make: Makes a new one.
        idle: Seconds that one is kept after its last use.
        closed: Seconds that one is kept after its tab was closed: a phone's screen may only have been locked.
        most: How many are kept; the one that was unused for the longest gives way to a new one.
    """

    def __init__(
        self,
        make: Callable[[], Session],
        idle: float = KEEP_IDLE,
        closed: float = KEEP_CLOSED,
        most: int = MOST_SESSIONS,
    ):
        self._make, self._idle, self._closed, self._most = make, idle, closed, most
        self._sessions: dict[str, Session] = {}
        self._forgotten: deque[str] = deque(maxlen=10_000)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="sessions", daemon=True).start()

    def _watch(self) -> None:
        """Frees what has expired, on a server that nobody asks for anything, too."""
        while not self._ended.wait(min(60, self._idle, self._closed)):
            self.forget_expired()

    def __len__(self) -> int:
        return len(self._sessions)

    def has_forgotten(self, name: str) -> bool:
        """Whether a tab had a session that is forgotten, and has no other yet."""
        return name not in self._sessions and name in self._forgotten

    def get(self, name: str) -> Session:
        """The session of a tab, a new one if there is none."""
        self.forget_expired()
        oldest = None
        with self._lock:
            session = self._sessions.pop(name, None) or self._make()
            if len(self._sessions) >= self._most:
                idle = (x for x, other in self._sessions.items() if not other.busy)
                unused = next(idle, next(iter(self._sessions)))
                oldest = self._sessions.pop(unused)
                self._forgotten.append(unused)
            self._sessions[name] = session  # behind all others: in the order of their last use
            session.expires, session.is_closed = time.monotonic() + self._idle, False
        if oldest is not None:
            oldest.close()
        return session

    def leave(self, name: str) -> None:
        """Says that a tab was closed."""
        with self._lock:
            if name in self._sessions:
                session = self._sessions[name]
                session.expires, session.is_closed = time.monotonic() + self._closed, True

    def forget_expired(self) -> None:
        with self._lock:
            now = time.monotonic()
            expired = [name for name, x in self._sessions.items() if x.expires <= now and (x.is_closed or not x.busy)]
            sessions = [self._sessions.pop(name) for name in expired]
            self._forgotten += expired
        for session in sessions:
            session.close()

    def close(self) -> None:
        """Ends all answers, so that the process can end."""
        self._ended.set()
        for session in list(self._sessions.values()):
            session.close()
