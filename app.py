"""The page: pictures, videos and documents shown to a model in the browser, and questions about them (Gradio).

To a model that reads text only documents are shown.

    mmmamba app my-model/                                   # on this machine
    mmmamba push my-model/ user/model --space user/page     # on the Hub

In a Space this file and `app_sessions.py` stand alone: the model's code comes with the model.
"""

import base64
import html
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModel, AutoProcessor

from .app_sessions import KEEP_CLOSED, KEEP_IDLE, Branch, ModelThread, Reader, Session, Sessions, Turn, message


HERE = Path(__file__).resolve().parent
MODEL = os.environ.get(
    "MMMAMBA_MODEL", "examples/shapes/hybrid"
)  # `mmmamba push --space` writes the model's name here
MAX_FILE_SIZE = "200mb"
LARGEST_TOY_VOCABULARY = 1000  # the models of the picture world have 655 tokens

# In a Space the picture lies beside this file.
PICTURE = next((x for x in (HERE / "picture.png", HERE / "examples/shapes/picture.png") if x.exists()), None)
TOY_QUESTIONS = ("How many objects are there?", "What number is on the purple card?", "What color is the star?")
QUESTIONS = ("What is in this picture?", "Which numbers are on the cards?", "What color is the star?")


def load(path: str, device: str | None = None):
    """A model, in fp32 on a CPU and else in the dtype of its weights, its tokenizer and its video processor.

    The last is None for a model that reads text only.

    Args:
        path: A folder, or a name on the Hub.
        device: The GPU if there is one, or else the CPU, if not given.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    # Of a model that reads text only this is its tokenizer.
    return model, getattr(processor, "tokenizer", processor), getattr(processor, "video_processor", None)


def format_bytes(count: int) -> str:
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{count / 2 ** (10 * power):.1f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{count} bytes"


def panel(branch: Branch) -> str:
    """What the model keeps of a conversation, as HTML."""
    tokens, states, keys = branch.size
    totals = f"<p><b>{tokens:,}</b> tokens read</p><p><b>{format_bytes(states + keys)}</b> of state</p>"
    rows = {"States, constant": states, "Keys and values, growing": keys}
    rows = "".join(f"<li>{name}<b>{format_bytes(count)}</b></li>" for name, count in rows.items())
    return f"<div class='totals'>{totals}</div><ul>{rows}</ul>"


def progress(turn: Turn | None) -> str:
    """What the model does now, as HTML; nothing when it is idle."""
    if turn is None or turn.finished.is_set():
        return ""
    text = html.escape(turn.activity)
    if not turn.activity.startswith("reading"):
        return f"<div class='activity'><span>{text} …</span></div>"
    bar = f"<progress max='1' value='{turn.share:.3f}'></progress><span>{turn.share:.0%}</span>"
    return f"<div class='activity'><span class='what'>{text}</span>{bar}</div>"


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows a ValueError on the page, which goes on."""
    try:
        yield
    except ValueError as error:
        gr.Warning(html.escape(str(error)))


def build(
    model, tokenizer, video_processor, name: str, idle: float = KEEP_IDLE, closed: float = KEEP_CLOSED
) -> gr.Blocks:
    """The page of a model.

    Args:
        model, tokenizer, video_processor: As `load` returns them.
        name: What the page calls the model.
        idle, closed: See `Sessions`.

    Returns:
        The page; its attribute `sessions` holds what is open.
    """
    reader, thread = Reader(model, tokenizer, video_processor), ModelThread()
    sessions = Sessions(partial(Session, model, reader), idle, closed)
    reads_pictures, is_toy = video_processor is not None, len(tokenizer) <= LARGEST_TOY_VOCABULARY
    shows_example = PICTURE is not None and reads_pictures
    questions = (TOY_QUESTIONS if is_toy else QUESTIONS) if shows_example else ()
    example = ""
    if shows_example:
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
        if session.busy:
            messages[-1:] = [message("assistant", turn.text)] if turn.text else []
        names = [x.name for x in session.branches]
        return [messages, progress(turn), panel(branch), gr.Radio(names, value=branch.name)]

    def session_of(request: gr.Request) -> Session:
        if sessions.has_forgotten(request.session_hash):
            gr.Warning("The conversation was not used for long and is forgotten; this is a new one.")
        return sessions.get(request.session_hash)

    def start(request: gr.Request):
        return view(session_of(request))

    def leave(request: gr.Request):
        sessions.leave(request.session_hash)

    def changing(action):
        """A handler that does something with the session of the tab, and shows it, or why it cannot be done."""

        def change(value, request: gr.Request):
            session = session_of(request)
            with shown_errors():
                session.check_idle()
                action(session, value)
            return view(session)

        return change

    def save(request: gr.Request):
        path, session = gr.skip(), session_of(request)
        with shown_errors():
            session.check_idle()
            path = gr.DownloadButton(value=session.save())
        return path

    def stop(request: gr.Request):
        session_of(request).stop()

    def send(typed: dict, longest: int, temperature: float, num_frames: int, request: gr.Request):
        """Answers; yields values of `shown` and the composer while the answer grows."""
        session = session_of(request)
        options = {"max_new_tokens": int(longest), "do_sample": temperature > 0}
        options |= {"temperature": temperature} if temperature > 0 else {}
        turn = None
        with shown_errors():
            session.check_idle()
            uploads = [reader.open(path, int(num_frames)) for path in typed["files"]]
            turn = session.begin(uploads, typed["text"], options)
        if turn is None:
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
        yield from send({"text": questions[event.index], "files": [str(PICTURE)]}, 256, 0, 1, request)

    def attach(photo: str | None, typed: dict):
        """Puts a photo of the camera beside what is typed."""
        if photo is None:
            return gr.skip(), gr.skip()
        return typed | {"files": [*typed["files"], photo]}, None

    with gr.Blocks(title=f"mmMamba · {name}", analytics_enabled=False, delete_cache=(600, 7200)) as page:
        counts = Counter(model.config.text_config.layer_types)
        layers = f"{counts['linear_attention']} Mamba-2 and {counts['full_attention']} attention layers"
        gr.HTML(f"<h1>{html.escape(name)}</h1><p>mmMamba · {layers} · {model.device}</p>", elem_id="head")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    buttons=["copy"],
                    layout="bubble",
                    # Plain text: Markdown of an answer or a file could make the browser fetch from elsewhere.
                    render_markdown=False,
                    latex_delimiters=[],
                    height="var(--chat-height)",
                    allow_file_downloads=False,
                    placeholder=f"<h2>{'Show it something, then ask' if reads_pictures else 'Ask'}</h2>{example}",
                    examples=[{"text": x} for x in questions],
                )
                activity = gr.HTML(elem_id="activity")
                composer = gr.MultimodalTextbox(
                    elem_id="composer",
                    show_label=False,
                    file_count="multiple",
                    placeholder=f"Ask, or drop {'pictures, videos and texts' if reads_pictures else 'texts'} here",
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
                with gr.Accordion("Camera", open=False, visible=reads_pictures, elem_id="camera"):
                    photo = gr.Image(sources=["webcam"], type="filepath", show_label=False)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    longest = gr.Slider(16, 2048, 256, step=16, label="Longest answer, in tokens")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: the likeliest answer)")
                    num_frames = gr.Slider(1, 64, 8, step=1, label="Frames of a video", visible=reads_pictures)

        shown = [chat, activity, state, branches]
        events = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        page.load(start, None, shown, **events)
        page.unload(leave)
        composer.submit(send, [composer, longest, temperature, num_frames], [*shown, composer], **events)
        composer.stop(stop, None, None, queue=False, **events)
        chat.example_select(try_example, None, [*shown, composer], **events)
        fork_button.click(changing(lambda session, _: session.fork()), branches, shown, **events)
        new_button.click(changing(lambda session, _: session.new()), branches, shown, **events)
        chat.clear(changing(lambda session, _: session.new()), branches, shown, **events)
        branches.input(changing(Session.choose), branches, shown, **events)
        load_button.upload(changing(Session.load), load_button, shown, **events)
        saved = save_button.click(save, None, download, **events)
        saved.success(None, js="() => setTimeout(() => document.querySelector('#download').click(), 200)")
        photo.input(attach, [photo, composer], [composer, photo], **events)
    page.sessions = sessions
    return page.queue(max_size=200)


FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CSS = """
.gradio-container { --chat-height: max(320px, calc(100dvh - 265px)); }
.gradio-container .fillable { padding: 16px clamp(10px, 3vw, 32px) !important; }
#head h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
#columns { gap: 16px; }
#chat .placeholder { align-items: center; text-align: center; }
#chat .placeholder img { margin: 14px auto 10px; border-radius: 10px; width: min(340px, 90%); }
#chat .placeholder p { color: var(--body-text-color-subdued); font-size: .9rem; }
#chat .example { min-height: 0; }
#chat .message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .message-buttons-right { display: none; }
#chat .user img { max-height: 220px; width: auto; border-radius: 8px; }
#activity { min-height: 38px; margin: -8px 0; }
.activity { display: flex; gap: 10px; align-items: center; color: var(--body-text-color-subdued); font-size: .85rem; }
.activity .what { max-width: 60%; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.activity progress { flex: 1; min-width: 40px; height: 8px; appearance: none; }
.activity progress, .activity progress::-webkit-progress-bar { background: var(--border-color-primary); }
.activity progress, .activity ::-webkit-progress-bar, .activity ::-webkit-progress-value { border-radius: 4px; }
.activity progress::-webkit-progress-value { background: var(--primary-500); }
.activity progress::-moz-progress-bar { background: var(--primary-500); }
#composer .submit-button, #composer .stop-button { background: var(--primary-600); color: white; border-radius: 50%; }
#state { background: var(--background-fill-secondary); border-radius: var(--block-radius); padding: 6px 8px; }
#state p, #state li { margin: 0; color: var(--body-text-color-subdued); font-size: .85rem; }
#state .totals { display: flex; flex-wrap: wrap; gap: 4px 32px; }
#state .totals b { display: block; color: var(--body-text-color); font-size: 1.35rem; line-height: 1.3; }
#state ul { list-style: none; margin: 10px 0 0; padding: 0; }
#state li { display: flex; justify-content: space-between; gap: 8px; }
#state li b { font-weight: 500; white-space: nowrap; }
.pair { flex-wrap: nowrap !important; gap: 8px !important; }
"""


def launch(page: gr.Blocks, **options) -> None:
    """Serves a page; what is loaded comes from this server alone.

    Args:
        options: More arguments of Gradio's `launch`.
    """
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono="monospace"
    )
    options = {"theme": theme, "css": CSS, "max_file_size": MAX_FILE_SIZE, "footer_links": [], **options}
    page.launch(run_history=False, enable_monitoring=False, ssr_mode=False, **options)


if __name__ == "__main__":
    launch(build(*load(MODEL), MODEL))
