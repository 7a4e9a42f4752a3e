"""The page: pictures, videos and documents shown to a model in the browser, and questions about them (Gradio).

    mmmamba app my-model/                                   # on this machine
    mmmamba push my-model/ user/model --space user/page     # on the Hub

In a Space this file stands alone: the model's code comes with the model.
"""

import base64
import html
import importlib
import logging
import mimetypes
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, StoppingCriteriaList


logger = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("MMMAMBA_MODEL", "examples/shapes/hybrid")  # `mmmamba push --space` names the model here
MAX_FILE_SIZE = "200mb"
PIECE = 4000  # characters of a document that are read at once
MOST_BRANCHES = 8
PICTURE_SIZE = 512  # longest side of a picture in the chat
KEEP_IDLE, KEEP_CLOSED = 3600, 300  # seconds that a conversation outlives its last use, and its browser tab
LARGEST_TOY_VOCABULARY = 1000  # the models of the picture world have 655 tokens

# In a Space the picture lies beside this file.
PICTURE = next((x for x in (HERE / "picture.png", HERE / "examples/shapes/picture.png") if x.exists()), None)
TOY_QUESTIONS = ("How many objects are there?", "What number is on the purple card?", "What color is the star?")
QUESTIONS = ("What is in this picture?", "Which numbers are on the cards?", "What color is the star?")


def load(path: str, device: str | None = None):
    """A model and its processor, from a folder or the Hub: in fp32 on a CPU, else in the dtype of its weights."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=True).to(device).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True)


# --- what is uploaded ------------------------------------------------------------------------------------------------


@dataclass
class Upload:
    """A file that somebody gave, opened and checked.

    Attributes:
        name: Of the file.
        thumbnail: What the chat shows of it; None for a document.
        parts: What the model reads, piece by piece: a text with its picture, or None where it has none.
    """

    name: str
    thumbnail: Image.Image | None
    parts: list[tuple[str, Image.Image | np.ndarray | None]]


class Reader:
    """Opens uploads as a model reads them.

    Args:
        model, processor: As `load` returns them.
    """

    def __init__(self, model, processor):
        package = type(processor.video_processor).__module__.rpartition(".")[0]
        chat_template, images, videos = (
            importlib.import_module(f"{package}.{name}_mmmamba")
            for name in ("chat_template", "image_reading", "video_reading")
        )
        self.as_text = partial(chat_template.as_text, tokenizer=processor.tokenizer)
        self._read_image, self._video_reader = images.read_image, videos.VideoReader
        self._processor = processor.video_processor

    def open(self, path: str | Path, num_frames: int) -> Upload:
        """A picture, a video (evenly spaced frames of it) or a text in UTF-8.

        Raises:
            ValueError: if it is none of them, or damaged.
        """
        path = Path(path)
        kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
        opening = {"image": self._picture, "video": partial(self._video, num_frames=num_frames)}
        try:
            return opening.get(kind, self._document)(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from None

    def _picture(self, path: Path) -> Upload:
        image = self._read_image(path)
        return Upload(path.name, image, [("", image)])

    def _video(self, path: Path, num_frames: int) -> Upload:
        with self._video_reader(path) as video:
            frames = video.sample(partial(self._processor.sample_frames, num_frames=num_frames))
        parts = [(f"Frame{number}: <image>\n", frame) for number, frame in enumerate(frames, 1)]
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
        error: Why there is no answer, in a sentence; empty if there is one.
    """

    def __init__(self, branch: Branch, uploads: list[Upload], question: str, options: dict, reader: Reader, processor):
        self.branch, self.uploads, self.question, self.options = branch, uploads, question, options
        self.reader, self.processor = reader, processor
        self.activity, self.share, self.error = "waiting for its turn", 0.0, ""
        self.stop, self.finished = threading.Event(), threading.Event()
        self._ids: list[int] = []
        self._is_prompt = True

    def steps(self) -> Iterator[None]:
        """Does all of it, a step between two yields; runs in the model's thread."""
        message = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
        try:
            yield from self._read()
            if self.question and not self.stop.is_set():
                self.activity = "answering"
                message["content"] = [{"type": "text", "text": self._answer()}]
            else:
                note = "Stopped before all was read." if self.stop.is_set() else "Read."
                message["content"] = [{"type": "text", "text": f"*{note} Ask about it.*"}]
        except Exception as error:  # a device may be out of memory; the page goes on
            if not isinstance(error, ValueError):
                logger.exception("a turn failed")
            self.error = " ".join(str(error).split()) or type(error).__name__
            text = f"{self.error}\n\nThe conversation goes on as it was before."
            message |= {"content": [{"type": "text", "text": text}], "metadata": {"title": "⚠ Not answered"}}
        finally:
            self.branch.messages.append(message)
            self.branch.measure()
            self.finished.set()

    def _read(self) -> Iterator[None]:
        state, total = self.branch.state, sum(len(upload.parts) for upload in self.uploads)
        done = 0
        for upload in self.uploads:
            for text, picture in upload.parts:
                if self.stop.is_set():
                    return
                self.activity, self.share = f"reading {upload.name}", done / total
                if isinstance(picture, np.ndarray):  # a frame
                    inputs = self.processor.video_processor([picture[None]], return_tensors="pt")
                    state.extend(text, inputs["pixel_values"], inputs["num_patches"].tolist())
                else:
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
        return self.processor.tokenizer.decode(list(self._ids), skip_special_tokens=True).rstrip("\ufffd")


class Session:
    """What one browser tab has: a conversation and its forks.

    Attributes:
        branches: Of the conversation; `branch` is the one shown.
        turn: The last one, or None.
        expires: When it is forgotten, by `time.monotonic`.
        is_closed: Whether its tab was closed since it was used last.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
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

    def begin(self, uploads: list[Upload], question: str, options: dict, reader: Reader) -> Turn:
        """A new turn, to be run by a `ModelThread`.

        Raises:
            ValueError: if another is under way, or there is nothing to read and no question.
        """
        question = question.strip()
        if not uploads and not question:
            raise ValueError("There is no question; type one, or add a file.")
        with self._lock:
            self.check_idle()
            content = [
                {"path": self._saved(x.thumbnail), "alt_text": x.name}
                if x.thumbnail
                else {"type": "text", "text": f"📄 {html.escape(x.name)}"}
                for x in uploads
            ]
            if question:
                content.append({"type": "text", "text": html.escape(question, quote=False)})
            self.turn = Turn(self.branch, uploads, question, options, reader, self.processor)
            self.branch.messages.append({"role": "user", "content": content})
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
        self.check_idle()
        self.branches = []
        self._add(self.model.conversation(self.processor.tokenizer), [])

    def fork(self) -> None:
        """Copies the conversation; the copy is shown."""
        self.check_idle()
        self._check_room()
        self._add(self.branch.state.fork(), list(self.branch.messages))

    def choose(self, name: str) -> None:
        """Shows another branch."""
        self.check_idle()
        self.branch = next((x for x in self.branches if x.name == name), self.branch)

    def save(self) -> str:
        """Writes the conversation to a file and returns its path."""
        self.check_idle()
        path = Path(self._folder.name, f"conversation-{len(self.branch.state)}-tokens.safetensors")
        self.branch.state.save(path)
        return str(path)

    def load(self, path: str | Path) -> None:
        """Adds a saved conversation as a branch. Raises ValueError if it is none, or another model's."""
        self.check_idle()
        self._check_room()
        path = Path(path)
        try:
            state = type(self.branch.state).load(path, self.model, self.processor.tokenizer)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from None
        content = [{"type": "text", "text": transcript(state, self.processor.tokenizer)}]
        title = f"Loaded from {path.name}: what was said before"
        self._add(state, [{"role": "assistant", "content": content, "metadata": {"title": title}}])

    def _check_room(self) -> None:
        if len(self.branches) >= MOST_BRANCHES:
            raise ValueError(f"There are {MOST_BRANCHES} branches, and no more fit; save this one and begin anew.")

    def _add(self, state, messages: list[dict]) -> None:
        number = 1 + max((int(x.name) for x in self.branches), default=0)
        self.branch = Branch(str(number), state, messages)
        self.branch.measure()
        self.branches.append(self.branch)

    def close(self) -> None:
        """Frees what is kept."""
        if self.turn is not None:
            self.turn.stop.set()
        self._folder.cleanup()


def transcript(state, tokenizer, longest: int = 4000) -> str:
    """The end of what a state has read, as text in which each picture is one word."""
    pending = tokenizer(state.pending, add_special_tokens=False)["input_ids"] if state.pending else []
    text = tokenizer.decode([*state.ids[-4 * longest :], *pending])
    text = re.sub(r"(<img>)?(<IMG_CONTEXT>)+(</img>)?", "[picture]", text)
    text = re.sub(r"<\|im_start\|>(\w+)\n?", r"\n\n\1: ", text)
    text = re.sub(r"<\|im_end\|>|</?s>", "", text).strip()
    return html.escape(text if len(text) <= longest else f"… {text[-longest:]}", quote=False)


class Sessions:
    """The sessions of all browser tabs, by Gradio's name of the tab.

    Args:
        make: Makes a new one.
        idle: Seconds that one is kept after its last use.
        closed: Seconds that one is kept after its tab was closed: a phone's screen may only have been locked.
    """

    def __init__(self, make, idle: float = KEEP_IDLE, closed: float = KEEP_CLOSED):
        self._make, self._idle, self._closed = make, idle, closed
        self._sessions: dict[str, Session] = {}
        self._forgotten: deque[str] = deque(maxlen=10_000)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def start(self, name: str) -> Session:
        """The session of a tab, a new one if there is none."""
        self.forget_expired()
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = self._make()
            session.expires, session.is_closed = time.monotonic() + self._idle, False
            return session

    def get(self, name: str) -> Session:
        """The same; the page says so if the conversation that it shows is forgotten."""
        if name not in self._sessions and name in self._forgotten:
            gr.Warning("The conversation was not used for long and is forgotten; this is a new one.")
        return self.start(name)

    def leave(self, name: str) -> None:
        """Says that a tab was closed."""
        with self._lock:
            if name in self._sessions:
                session = self._sessions[name]
                session.expires, session.is_closed = time.monotonic() + self._closed, True
        timer = threading.Timer(self._closed + 0.01, self.forget_expired)
        timer.daemon = True
        timer.start()

    def forget_expired(self) -> None:
        with self._lock:
            now = time.monotonic()
            expired = [name for name, x in self._sessions.items() if x.expires <= now and (x.is_closed or not x.busy)]
            sessions = [self._sessions.pop(name) for name in expired]
            self._forgotten += expired
        for session in sessions:
            session.close()


# --- the page --------------------------------------------------------------------------------------------------------


def describe_layers(config) -> str:
    """Such as "4 Mamba-2 and 2 attention layers"."""
    kinds = config.text_config.layer_types
    counts = [(kinds.count("linear_attention"), "Mamba-2"), (kinds.count("full_attention"), "attention")]
    return " and ".join(f"{count} {name}" for count, name in counts if count) + " layers"


def format_bytes(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def panel(branch: Branch, kinds: list[str]) -> str:
    """What the model keeps of a conversation, as HTML."""
    tokens, fixed, growing = branch.size
    rows = []
    if "linear_attention" in kinds:
        rows.append(("States, constant", fixed))
    if "full_attention" in kinds:
        rows.append(("Keys and values, growing", growing))
    else:
        rows.append(("Keys and values: none, so it stays so small", None))
    cells = "".join(
        f"<li><span>{text}</span>" + ("" if count is None else f"<b>{format_bytes(count)}</b>") + "</li>"
        for text, count in rows
    )
    return (
        f"<div class='totals'><p><b>{tokens:,}</b> tokens read</p><p><b>{format_bytes(fixed + growing)}</b> kept of them"
        f"</p></div><ul>{cells}</ul>"
    )


def progress(turn: Turn | None) -> str:
    """What the model does now, as HTML; nothing when it is idle."""
    if turn is None or turn.finished.is_set():
        return ""
    text = html.escape(turn.activity)
    if not turn.activity.startswith("reading"):
        return f"<div class='activity'><span>{text} …</span></div>"
    bar = f"<progress max='1' value='{turn.share:.3f}'></progress><span>{turn.share:.0%}</span>"
    return f"<div class='activity'><span class='what'>{text}</span>{bar}</div>"


def build(model, processor, name: str, idle: float = KEEP_IDLE, closed: float = KEEP_CLOSED) -> gr.Blocks:
    """The page of a model.

    Args:
        model, processor: As `load` returns them.
        name: What the page calls the model.
        idle, closed: See `Sessions`.

    Returns:
        The page; its attribute `sessions` holds what is open.
    """
    reader, thread = Reader(model, processor), ModelThread()
    sessions = Sessions(lambda: Session(model, processor), idle, closed)
    kinds = model.config.text_config.layer_types
    is_toy = len(processor.tokenizer) <= LARGEST_TOY_VOCABULARY
    questions = (TOY_QUESTIONS if is_toy else QUESTIONS) if PICTURE else ()
    example = ""
    if PICTURE:
        about = (
            "This small model knows eleven kinds of questions about shapes and cards like these, and nothing else."
            if is_toy
            else "A drawing to try the page with; the model was not trained on its like."
        )
        data = base64.b64encode(PICTURE.read_bytes()).decode()
        example = f'<img src="data:image/png;base64,{data}" alt="shapes and numbered cards"><p>{about}</p>'

    def view(session: Session) -> list:
        """Values of `shown`."""
        branch, turn = session.branch, session.turn
        messages = list(branch.messages)
        if session.busy and turn.text:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.text}]})
        names = [x.name for x in session.branches]
        return [messages, progress(turn), panel(branch, kinds), gr.Radio(names, value=branch.name)]

    def start(request: gr.Request):
        return view(sessions.start(request.session_hash))

    def leave(request: gr.Request):
        sessions.leave(request.session_hash)

    def act(action, request: gr.Request) -> Session:
        """Does something with the session that a request comes from; what it refuses is shown on the page."""
        session = sessions.get(request.session_hash)
        try:
            action(session)
        except ValueError as error:
            gr.Warning(html.escape(str(error)))
        return session

    def new(request: gr.Request):
        return view(act(Session.new, request))

    def fork(request: gr.Request):
        return view(act(Session.fork, request))

    def choose(branch: str, request: gr.Request):
        return view(act(lambda session: session.choose(branch), request))

    def load_state(path: str, request: gr.Request):
        return view(act(lambda session: session.load(path), request))

    def save(request: gr.Request):
        paths: list[str] = []
        act(lambda session: paths.append(session.save()), request)
        return gr.DownloadButton(value=paths[0]) if paths else gr.skip()

    def stop(request: gr.Request):
        if (turn := sessions.get(request.session_hash).turn) is not None:
            turn.stop.set()

    def send(message: dict, longest: int, temperature: float, num_frames: int, request: gr.Request):
        """Answers; yields values of `shown` and the composer while the answer grows."""
        session = sessions.get(request.session_hash)
        options = {"max_new_tokens": int(longest), "do_sample": temperature > 0}
        options |= {"temperature": temperature} if temperature > 0 else {}
        try:
            session.check_idle()
            uploads = [reader.open(path, int(num_frames)) for path in message["files"]]
            turn = session.begin(uploads, message["text"], options, reader)
        except ValueError as error:
            gr.Warning(html.escape(str(error)))
            yield [*view(session), gr.skip()]
            return
        thread.start(turn)
        yield [*view(session), gr.MultimodalTextbox({"text": "", "files": []}, submit_btn=False, stop_btn=True)]
        seen = None
        while not turn.finished.wait(0.05):
            if seen != (seen := (turn.text, turn.activity, turn.share)):
                yield [*view(session), gr.skip()]
        yield [*view(session), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)]

    def try_example(event: gr.SelectData, request: gr.Request):
        message = {"text": questions[event.index], "files": [str(PICTURE)]}
        yield from send(message, 256, 0.0, 8, request)

    def attach(photo: str | None, message: dict):
        """Puts a photo of the camera beside what is typed."""
        if photo is None:
            return gr.skip(), gr.skip()
        return {"text": message["text"], "files": [*message["files"], photo]}, None

    with gr.Blocks(title=f"mmMamba · {name}", analytics_enabled=False, delete_cache=(600, 7200)) as page:
        layers = describe_layers(model.config)
        gr.HTML(f"<h1>{html.escape(name)}</h1><p>mmMamba · {layers} · {model.device}</p>", elem_id="head")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    buttons=["copy"],
                    layout="bubble",
                    allow_tags=False,
                    height="var(--chat-height)",
                    allow_file_downloads=False,
                    placeholder=f"<h2>Show it something, then ask</h2>{example}",
                    examples=[{"text": x} for x in questions],
                )
                activity = gr.HTML(elem_id="activity")
                composer = gr.MultimodalTextbox(
                    elem_id="composer",
                    show_label=False,
                    file_count="multiple",
                    placeholder="Ask, or drop pictures, videos and texts here",
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
            with gr.Column(scale=1, min_width=260, elem_id="side"):
                state = gr.HTML(elem_id="state")
                branches = gr.Radio([], label="Branches", elem_id="branches")
                with gr.Row(elem_classes="pair"):
                    fork_button = gr.Button("Fork", size="sm", min_width=80, elem_id="fork")
                    new_button = gr.Button("New", size="sm", min_width=80, elem_id="new")
                with gr.Row(elem_classes="pair"):
                    save_button = gr.Button("Save", size="sm", min_width=80, elem_id="save")
                    load_button = gr.UploadButton(
                        "Load", size="sm", min_width=80, file_types=[".safetensors"], elem_id="load"
                    )
                download = gr.DownloadButton("Download", visible="hidden", elem_id="download")
                with gr.Accordion("Camera", open=False, elem_id="camera"):
                    photo = gr.Image(sources=["webcam"], type="filepath", show_label=False)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    longest = gr.Slider(16, 2048, 256, step=16, label="Longest answer, in tokens")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: the likeliest answer)")
                    num_frames = gr.Slider(1, 64, 8, step=1, label="Frames of a video")

        shown = [chat, activity, state, branches]
        events = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        page.load(start, None, shown, **events)
        page.unload(leave)
        composer.submit(send, [composer, longest, temperature, num_frames], [*shown, composer], **events)
        composer.stop(stop, None, None, queue=False, **events)
        chat.example_select(try_example, None, [*shown, composer], **events)
        fork_button.click(fork, None, shown, **events)
        new_button.click(new, None, shown, **events)
        chat.clear(new, None, shown, **events)
        branches.input(choose, branches, shown, **events)
        load_button.upload(load_state, load_button, shown, **events)
        saved = save_button.click(save, None, download, **events)
        saved.success(None, js="() => setTimeout(() => document.querySelector('#download').click(), 200)")
        photo.input(attach, [photo, composer], [composer, photo], **events)
    page.sessions = sessions
    return page.queue(max_size=200)


CSS = """
.gradio-container { --chat-height: max(320px, calc(100dvh - 250px)); }
#head h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
#columns { gap: 20px; }
#chat .placeholder { align-items: center; text-align: center; }
#chat .placeholder img { margin: 14px auto 10px; border-radius: 10px; width: min(340px, 90%); }
#chat .placeholder p { color: var(--body-text-color-subdued); font-size: .9rem; }
#chat .example { min-height: 0; }
#chat .message-buttons-right { display: none; } /* of pictures: Gradio would share them with others */
#chat .user img { max-height: 300px; width: auto; border-radius: 8px; }
#activity { min-height: 22px; margin: -8px 0; }
.activity { display: flex; gap: 10px; align-items: center; color: var(--body-text-color-subdued); font-size: .85rem; }
.activity .what { max-width: 60%; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.activity progress { flex: 1; min-width: 40px; height: 8px; accent-color: var(--primary-500); }
#composer .submit-button, #composer .stop-button { background: var(--primary-600); color: white; border-radius: 50%; }
#state { background: var(--background-fill-secondary); border-radius: var(--block-radius); padding: 6px 8px; }
#state p, #state li { margin: 0; color: var(--body-text-color-subdued); font-size: .85rem; }
#state .totals { display: flex; flex-wrap: wrap; gap: 4px 32px; }
#state .totals b { display: block; color: var(--body-text-color); font-size: 1.35rem; line-height: 1.3; }
#state ul { list-style: none; margin: 10px 0 0; padding: 0; }
#state li { display: flex; justify-content: space-between; gap: 8px; }
#state li b { font-weight: 500; white-space: nowrap; }
.pair { flex-wrap: nowrap !important; gap: 8px !important; }
@media (max-width: 700px) {
    .gradio-container { --chat-height: max(300px, calc(100dvh - 240px)); }
    .gradio-container .fillable.fillable { padding: 10px !important; }
    #columns { gap: 12px; }
}
"""


def launch(page: gr.Blocks, **options) -> None:
    """Serves a page; what is loaded comes from this server alone.

    Args:
        options: More arguments of Gradio's `launch`.
    """
    page.launch(
        theme=gr.themes.Default(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="lg",
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=CSS,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        **options,
    )


if __name__ == "__main__":
    launch(build(*load(MODEL), MODEL))
