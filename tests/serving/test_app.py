"""The page in a browser: what people do with it, at a desk and on a phone, several at once.

Needs Gradio, Playwright and a Chromium; without one of them these tests are skipped.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from model_folders import self_contained_copy
from PIL import Image

import mmmamba
from mmmamba import app_sessions
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.space import space_files
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.examples.shapes.world import conversation


pytest.importorskip("gradio", reason="the page needs Gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested through Playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the page is tested in Chromium, which is not installed", allow_module_level=True)

from mmmamba import app  # noqa: E402  # imports Gradio


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"
PICTURE = SHAPES / "picture.png"
GREEDY = {"max_new_tokens": 256, "do_sample": False}
QUESTION = "How many objects are there?"
CLOSED = 1.0  # seconds that a conversation outlives its tab here
SECONDS = 60  # the longest that anything here may take
# Collects what the last answer looked like while it grew, and how much of a document was read.
WATCH = """() => {
    window.answers = []; window.shares = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll('#chat .bot .message');
        const bar = document.querySelector('#activity progress');
        const text = answers.length ? answers[answers.length - 1].innerText.trim() : '';
        if (text && text !== window.answers.at(-1)) window.answers.push(text);
        if (bar && bar.value !== window.shares.at(-1)) window.shares.push(bar.value);
    }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
}"""


@pytest.fixture(scope="module")
def page():
    """The page of the small hybrid, served in this process."""
    model, tokenizer, video_processor = app.load(str(SHAPES / "hybrid"))
    page = app.build(model, tokenizer, video_processor, "shapes-hybrid", closed=CLOSED)
    app.launch(page, server_port=free_port(), quiet=True, prevent_thread_lock=True, max_file_size="1mb")
    page.model, page.tokenizer, page.video_processor = model, tokenizer, video_processor
    yield page
    page.close(verbose=False)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    # The sandbox does not run as root; the camera is a made one, which nobody has to allow.
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, **options):
    """A new person's tab. Errors in its console and requests to other hosts than the page's fail the test."""
    context = browser.new_context(permissions=["camera"], **options)
    context.set_default_timeout(SECONDS * 1000)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda x: complaints.append(x.text) if x.type == "error" else None)
    tab.on("pageerror", lambda x: complaints.append(str(x)))
    tab.on("request", lambda x: None if x.url.startswith((url, "data:", "blob:")) else complaints.append(x.url))
    tab.goto(url)
    tab.wait_for_selector("#branches input")  # the session is there
    yield tab
    context.close()
    assert complaints == []


@pytest.fixture
def tab(browser, page):
    with opened(browser, page.local_url, viewport={"width": 1280, "height": 800}) as tab:
        yield tab


def attach(tab, *paths):
    tab.set_input_files("#composer input[type=file]", [str(path) for path in paths])
    tab.locator("#composer .thumbnail-item").nth(len(paths) - 1).wait_for()  # uploaded


def send(tab, question, *paths):
    """Types a question, with files, and sends it."""
    if paths:
        attach(tab, *paths)
    tab.fill("#composer textarea", question)
    tab.click("#composer .submit-button")


def ask(tab, question, *paths):
    """Asks and returns the whole answer."""
    before = tab.locator("#chat .bot.message").count()
    send(tab, question, *paths)
    return answer(tab, before)


def answer(tab, before):
    """The answer behind so many earlier ones, when it is whole."""
    tab.wait_for_function(
        "before => document.querySelectorAll('#chat .bot.message').length > before "
        "&& document.querySelector('#composer .submit-button') && !document.querySelector('.activity')",
        arg=before,
    )
    return tab.locator("#chat .bot.message").last.inner_text().strip()


def load(tab, path):
    with tab.expect_file_chooser() as chooser:
        tab.click("#load")
    chooser.value.set_files(path)


def tokens(tab):
    """How many tokens the page says were read."""
    return int(tab.locator("#state .totals b").first.inner_text().replace(",", ""))


def warning(tab, words):
    """The text of the page's message that says this; the message is closed then."""
    toast = tab.locator(".toast-body", has_text=words).last
    text = " ".join(toast.inner_text().split())
    toast.locator(".toast-close").click()
    return text


def test_the_first_sight_is_an_example_that_is_answered(tab):
    assert "eleven kinds of questions" in tab.inner_text("#chat .placeholder")
    assert tab.locator("#chat .placeholder img").evaluate("x => x.naturalWidth") == 384
    tab.locator("#chat .example", has_text=QUESTION).click()
    assert answer(tab, 0) == "six"
    assert tab.locator("#chat .user img").evaluate("x => x.naturalWidth") == 384


def test_the_streamed_answer_about_an_uploaded_picture_is_the_one_of_chat(tab, page, monkeypatch):
    monkeypatch.setattr(page.model.generation_config, "min_new_tokens", 30)
    expected = page.model.chat(page.tokenizer, Image.open(PICTURE), f"<image>\n{QUESTION}", {"max_new_tokens": 32})
    put = app_sessions.Turn.put
    monkeypatch.setattr(app_sessions.Turn, "put", lambda self, ids: (put(self, ids), time.sleep(0.05)))
    tab.click("#settings button")
    tab.locator("#settings input[type=number]").first.fill("32")
    tab.evaluate(WATCH)
    assert " ".join(ask(tab, QUESTION, PICTURE).split()) == " ".join(expected.split())
    seen = tab.evaluate("window.answers")
    assert len(seen) > 5 and all(later.startswith(earlier) for earlier, later in pairwise(seen))


def test_what_is_typed_answered_or_loaded_is_plain_text(tab, page, monkeypatch, tmp_path):
    text = "**x** <b>bold</b> ![x](http://127.0.0.1:9/?q) &amp; $$y$$\n\n    # line <img src='http://127.0.0.1:9/'>"
    monkeypatch.setattr(app_sessions.Turn, "text", text)
    monkeypatch.setattr(app_sessions.Turn, "_answer", lambda turn: text)
    assert ask(tab, text) == text
    assert tab.locator("#chat .user.message").inner_text().strip() == text
    monkeypatch.setattr(app_sessions, "transcript", lambda *args: text)
    file = tmp_path / "![x](http:).safetensors"
    page.model.conversation(page.tokenizer).extend("One").save(file)
    load(tab, str(file))
    tab.wait_for_selector("#branches label.selected:has-text('2')")
    assert text in tab.locator("#chat .bot.message").inner_text()
    assert tab.locator("#chat .message :is(img, b, strong, h1, .katex)").count() == 0


def test_a_fork_and_its_origin_go_on_independently(tab, page):
    truth = page.model.conversation(page.tokenizer)
    assert ask(tab, QUESTION, PICTURE) == truth.ask(QUESTION, GREEDY, Image.open(PICTURE))
    assert tokens(tab) == len(truth)
    tab.click("#fork")
    tab.wait_for_selector("#branches label.selected:has-text('2')")
    fork = truth.fork()
    number, color = "What number is on the purple card?", "What color is the star?"
    assert ask(tab, number) == fork.ask(number, GREEDY) == "40"
    assert tokens(tab) == len(fork)
    tab.click("#branches label:has-text('1')")
    tab.wait_for_function("document.querySelectorAll('#chat .bot.message').length == 1")
    assert ask(tab, color) == truth.ask(color, GREEDY) == "yellow"
    assert tokens(tab) == len(truth) != len(fork)
    assert number not in tab.inner_text("#chat")
    tab.click("#new")
    tab.wait_for_selector("#chat .example")
    assert tokens(tab) == 0


def test_a_saved_conversation_is_loaded_and_goes_on(tab, page, tmp_path):
    ask(tab, QUESTION, PICTURE)
    read = tokens(tab)
    with tab.expect_download() as download:
        tab.click("#save")
    assert download.value.suggested_filename == f"conversation-{read}-tokens.safetensors"
    file = tmp_path / "mine.safetensors"
    download.value.save_as(file)
    assert len(ConversationState.load(file, page.model, page.tokenizer)) == read
    tab.click("#new")
    tab.wait_for_selector("#chat .example")
    load(tab, str(file))
    tab.wait_for_selector("#branches label.selected:has-text('2')")
    assert "Loaded from mine.safetensors" in tab.inner_text("#chat")
    assert tokens(tab) == read
    assert ask(tab, "What color is the star?") == "yellow"


def test_a_document_is_read_with_a_progress_bar(tab, page, tmp_path, monkeypatch):
    monkeypatch.setattr(app_sessions, "PIECE", 200)
    text = "The ship sailed on. " * 100
    (tmp_path / "book.txt").write_text(text)
    tab.evaluate(WATCH)
    extend = ConversationState.extend
    with monkeypatch.context() as patch:  # pieces as slow as a large model's, each of which the browser shows
        patch.setattr(ConversationState, "extend", lambda *given: (time.sleep(0.2), extend(*given))[1])
        ask(tab, QUESTION, tmp_path / "book.txt")
    shares = tab.evaluate("window.shares")
    assert len(shares) > 3 and shares == sorted(shares) and shares[-1] < 1
    state = page.model.conversation(page.tokenizer)
    state.extend(text.rstrip() + "\n\n").ask(QUESTION, GREEDY)
    assert tokens(tab) == len(state)


def test_a_video_is_shown_as_the_frames_that_are_read(tab, page, tmp_path):
    clip = tmp_path / "clip.webm"
    write_clip(clip)
    question = "Where is the red star?"
    frames = page.video_processor([str(clip)], return_tensors="pt")
    lines = "".join(f"Frame{number}: <image>\n" for number in range(1, 9))
    state = page.model.conversation(page.tokenizer)
    expected = state.ask(lines + question, GREEDY, frames["pixel_values"], frames["num_patches"].tolist())
    assert ask(tab, question, clip) == expected
    assert tokens(tab) == len(state)
    sheet = tab.locator("#chat .user img")
    assert sheet.evaluate("x => [x.naturalWidth, x.naturalHeight]") == [512, 256]


def test_the_camera_takes_a_picture_for_the_next_question(tab):
    tab.click("#camera button")
    tab.click("#camera [title='grant webcam access'] button")
    tab.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    tab.click("#camera [aria-label='capture photo']")
    tab.wait_for_selector("#composer .thumbnail-item")
    tab.wait_for_function("document.querySelector('#composer .submit-button')")
    assert ask(tab, QUESTION)
    assert tab.locator("#chat .user img").evaluate("x => x.naturalWidth") > 100
    assert tab.locator("#composer .thumbnail-item").count() == 0


def test_an_answer_is_stopped_and_the_conversation_goes_on(tab, page, monkeypatch):
    put = app_sessions.Turn.put
    with monkeypatch.context() as patch:
        patch.setattr(page.model.generation_config, "min_new_tokens", 250)
        patch.setattr(app_sessions.Turn, "put", lambda self, ids: (put(self, ids), time.sleep(0.1)))
        send(tab, QUESTION, PICTURE)
        tab.wait_for_selector("#chat .bot.message")
        tab.click("#fork")  # not now
        warning(tab, "An answer is under way")
        start = time.monotonic()
        tab.click("#composer .stop-button")
        stopped = answer(tab, 0)
        assert time.monotonic() - start < 15  # the whole answer would take 25 seconds
    assert stopped and tab.locator("#branches label").count() == 1
    assert ask(tab, "What color is the star?")


def test_what_cannot_be_read_is_said_in_a_sentence(browser, page, tmp_path):
    files = {
        "broken.png": (PICTURE.read_bytes()[:900], "broken.png cannot be opened as a picture"),
        "words.mp4": (b"no video at all", "words.mp4 cannot be read as a video"),
        "latin.txt": ("Käse".encode("latin-1"), "latin.txt is no picture, no video and no text in UTF-8"),
    }
    with opened(browser, page.local_url) as tab:
        for name, (content, words) in files.items():
            (tmp_path / name).write_bytes(content)
            send(tab, QUESTION, tmp_path / name)
            said = warning(tab, words)
            assert "Traceback" not in said and str(tmp_path) not in said and "/gradio" not in said
            assert tab.input_value("#composer textarea") == QUESTION  # nothing typed is lost
            tab.click("#composer .delete-button")
        (tmp_path / "other.safetensors").write_bytes(b"no tensors")
        load(tab, str(tmp_path / "other.safetensors"))
        warning(tab, "other.safetensors is not a whole safetensors file")
        (tmp_path / "large.txt").write_text("word " * 300_000)
        tab.set_input_files("#composer input[type=file]", str(tmp_path / "large.txt"))
        warning(tab, "exceed the maximum allowed size")
        assert ask(tab, QUESTION, PICTURE) == "six"


def test_the_page_fits_a_phone(browser, page):
    with opened(browser, page.local_url, viewport={"width": 360, "height": 740}, has_touch=True) as tab:
        fits = "document.documentElement.scrollWidth <= 360"
        assert tab.evaluate(fits)
        assert ask(tab, QUESTION, PICTURE) == "six"
        tab.click("#camera button")
        tab.click("#settings button")
        assert tab.evaluate(fits)
        box = tab.locator("#composer").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_two_people_do_not_see_each_other_and_a_closed_tab_frees_its_memory(browser, page, tmp_path):
    pictures, _ = conversation("test", 0, 7)
    other = pictures[0].draw()
    other.save(tmp_path / "other.png")
    wait_until(lambda: not page.sessions)  # those of earlier tests are gone
    with opened(browser, page.local_url) as first, opened(browser, page.local_url) as second:
        send(first, QUESTION, PICTURE)
        send(second, QUESTION, tmp_path / "other.png")
        expected = [
            page.model.chat(page.tokenizer, image, f"<image>\n{QUESTION}", GREEDY)
            for image in (Image.open(PICTURE), other)
        ]
        assert [answer(first, 0), answer(second, 0)] == expected == ["six", "one"]
        assert tokens(first) != tokens(second)
        second.click("#fork")
        second.wait_for_selector("#branches label.selected:has-text('2')")
        assert first.locator("#branches label").count() == 1
        assert len(page.sessions) == 2
    wait_until(lambda: not page.sessions)


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def running(command, **options):
    """A process that serves a page; yields it and its address."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        output = ""
        while not (found := re.search(r"http://[\w.]+:\d+", output)):
            line = process.stdout.readline()
            assert line, output
            output += line
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_the_page_until_it_is_terminated(tmp_path):
    port = str(free_port())
    command = [sys.executable, "-m", "mmmamba", "app", str(SHAPES / "linear"), "--port", port, "--device", "cpu"]
    with running(command, cwd=tmp_path) as (process, url):
        assert url == f"http://127.0.0.1:{port}"
        assert "linear" in urllib.request.urlopen(url, timeout=SECONDS).read().decode()
        second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert second.returncode == 1 and f"--port {port}" in second.stderr.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 143


def test_a_space_runs_without_the_package(browser, tmp_path):
    model = self_contained_copy("linear", tmp_path / "model")
    space = tmp_path / "space"
    space.mkdir()
    for name, content in space_files("me/model").items():
        (space / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    # Python imports this module first; then it does not find a package that is installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mmmamba'] = None\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    without = [sys.executable, "-c", "import mmmamba"]
    assert subprocess.run(without, env=environment, cwd=space, capture_output=True).returncode != 0
    environment |= {"MMMAMBA_MODEL": str(model), "GRADIO_SERVER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONUNBUFFERED": "1"}
    with running([sys.executable, "app.py"], cwd=space, env=environment) as (_, url), opened(browser, url) as tab:
        tab.locator("#chat .example", has_text=QUESTION).click()
        assert answer(tab, 0) == "six"
        assert ask(tab, "What color is the star?") == "yellow"
