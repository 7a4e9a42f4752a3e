"""What the page does without Gradio: uploads, turns, forks, files and several people at once."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from language_models import write_source
from PIL import Image

import mmmamba
from mmmamba import app_sessions
from mmmamba.app_sessions import ModelThread, Reader, Session, Sessions, contact_sheet, transcript
from mmmamba.cli.main import main
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import convert
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast, load_tokenizer
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"
PICTURE = SHAPES / "picture.png"
GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def model():
    return MmMambaForConditionalGeneration.from_pretrained(SHAPES / "hybrid", dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return MmMambaTokenizerFast.from_pretrained(SHAPES / "hybrid")


@pytest.fixture(scope="module")
def video_processor():
    return MmMambaVideoProcessor.from_pretrained(SHAPES / "hybrid")


@pytest.fixture(scope="module")
def reader(model, tokenizer, video_processor):
    return Reader(model, tokenizer, video_processor)


@pytest.fixture
def session(model, reader):
    session = Session(model, reader)
    yield session
    session.close()


@pytest.fixture(scope="module")
def thread():
    return ModelThread()


@pytest.fixture
def ask(session, reader, thread):
    """Asks a question about files and returns what the page then shows as the answer."""

    def ask(question, *paths, options=GREEDY):
        turn = session.begin([reader.open(path, 4) for path in paths], question, options)
        thread.start(turn)
        assert turn.finished.wait(60)
        return shown(turn.message)

    return ask


def shown(message):
    return "".join(part.get("text", "") for part in message["content"])


def test_a_picture_and_a_question_are_answered_as_chat_answers_them(session, ask, model, tokenizer):
    expected = model.chat(tokenizer, Image.open(PICTURE), f"<image>\n{QUESTION}", GREEDY)
    assert ask(QUESTION, PICTURE) == expected == "six"
    said, answer = session.branch.messages
    assert said["role"] == "user" and said["content"][1]["text"] == QUESTION
    with Image.open(said["content"][0]["path"]) as thumbnail:
        assert thumbnail.size == Image.open(PICTURE).size
    assert answer["content"][0]["text"] == expected
    tokens, states, keys = session.branch.size
    assert tokens == len(session.branch.state) and states + keys == session.branch.state.nbytes


def test_a_document_is_read_in_pieces_as_if_it_were_read_at_once(
    session, ask, reader, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(app_sessions, "PIECE", 7)
    text = "The ship <image> sailed </s> on. <|im_end|> It was late, said the captain.\n"
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(reader.open(tmp_path / "book.txt", 4).parts) > 8
    assert "Read" in ask("", tmp_path / "book.txt")
    at_once = ConversationState(session.model, tokenizer)
    at_once.extend(reader.as_text(text.rstrip() + "\n\n"))
    for state in (session.branch.state, at_once):
        state.ask(QUESTION, GREEDY)
        state.extend("So")
    assert session.branch.state.ids == at_once.ids


def test_a_video_is_a_line_for_each_frame(session, ask, tokenizer, video_processor, tmp_path):
    write_clip(tmp_path / "clip.mkv")
    answer = ask("Where is the red star?", tmp_path / "clip.mkv")
    frames = video_processor([str(tmp_path / "clip.mkv")], num_frames=4, return_tensors="pt")
    question = "".join(f"Frame{n}: <image>\n" for n in (1, 2, 3, 4)) + "Where is the red star?"
    state = ConversationState(session.model, tokenizer)
    assert answer == state.ask(question, GREEDY, frames["pixel_values"], frames["num_patches"].tolist())
    assert session.branch.state.ids == state.ids


def test_frames_are_shown_side_by_side():
    frames = np.zeros((6, 90, 160, 3), dtype=np.uint8)
    frames[5] = 200
    sheet = contact_sheet(frames)
    assert sheet.size == (4 * 128, 2 * 72)
    assert sheet.getpixel((128 + 9, 72 + 9)) == (200, 200, 200) and sheet.getpixel((9, 72 + 9)) == (0, 0, 0)


def bad_files(folder):
    """Name to content, and what the sentence must say."""
    files = {
        "broken.png": (PICTURE.read_bytes()[:900], "cannot be opened as a picture"),
        "words.mp4": (b"no video at all", "cannot be read as a video"),
        "latin.txt": ("Käse".encode("latin-1"), "no text in UTF-8"),
        "paper.pdf": (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "no text in UTF-8"),
        "blank.md": (b" \n\n", "is empty"),
    }
    for name, (content, words) in files.items():
        (folder / name).write_bytes(content)
        yield folder / name, words


def test_files_that_cannot_be_read_are_refused_by_name_and_the_conversation_stays(session, reader, ask, tmp_path):
    for path, words in bad_files(tmp_path):
        with pytest.raises(ValueError) as error:
            reader.open(path, 4)
        assert path.name in str(error.value) and words in str(error.value) and str(tmp_path) not in str(error.value)
    assert session.branch.messages == [] and ask(QUESTION, PICTURE) == "six"


def test_nothing_to_say_is_refused(session):
    with pytest.raises(ValueError, match="no question"):
        session.begin([], " \n", GREEDY)


def test_branches_go_on_independently(session, ask):
    ask(QUESTION, PICTURE)
    session.fork()
    assert ask("What number is on the purple card?") == "40"
    session.choose("1")
    assert len(session.branch.messages) == 2
    assert ask("What color is the star?") == "yellow"
    assert [len(x.messages) for x in session.branches] == [4, 4]
    assert shown(session.branches[1].messages[2]) == "What number is on the purple card?"
    session.new()
    assert [(x.name, x.size) for x in session.branches] == [("1", (0, 0, 0))]


def test_there_are_no_more_branches_than_are_allowed(session, monkeypatch):
    monkeypatch.setattr(app_sessions, "MOST_BRANCHES", 3)
    session.fork()
    session.fork()
    with pytest.raises(ValueError, match="3 branches"):
        session.fork()


def test_a_saved_conversation_goes_on_where_it_was(session, ask):
    ask(QUESTION, PICTURE)
    path = Path(session.save())
    assert path.name == f"conversation-{len(session.branch.state)}-tokens.safetensors"
    session.load(path)
    assert session.branch.name == "2" and session.branch.size == session.branches[0].size
    (note,) = session.branch.messages
    assert note["metadata"]["title"] == f"Loaded from {path.name}"
    assert f"\n\nuser: [picture]\n{QUESTION}" in shown(note) and shown(note).endswith("assistant: six")
    assert ask("What color is the star?") == "yellow"
    with pytest.raises(ValueError, match=r"^picture.png is not a whole safetensors file"):
        session.load(PICTURE)


def test_a_transcript_shows_the_end_of_a_long_conversation(session, ask, tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("word " * 300)
    ask(QUESTION, tmp_path / "book.txt")
    text = transcript(session.branch.state, tokenizer, longest=100)
    assert text.startswith("… ") and len(text) == 102 and QUESTION in text


def test_a_stopped_answer_is_part_of_the_conversation(session, reader, thread, monkeypatch):
    monkeypatch.setattr(session.model.generation_config, "min_new_tokens", 200)
    turn = session.begin([reader.open(PICTURE, 4)], QUESTION, {"max_new_tokens": 200, "do_sample": False})
    put = turn.put

    def stop_after_five(ids):
        put(ids)
        if len(turn._ids) == 5:
            assert session.busy
            with pytest.raises(ValueError, match="under way"):
                session.check_idle()
            session.stop()

    turn.put = stop_after_five
    thread.start(turn)
    assert turn.finished.wait(60) and not session.busy
    assert len(turn._ids) < 10
    assert shown(turn.message) == turn.text and turn.text in session.branch.state.pending


def test_a_stopped_document_is_not_read_to_its_end(session, reader, thread, tmp_path, monkeypatch):
    monkeypatch.setattr(app_sessions, "PIECE", 50)
    (tmp_path / "book.txt").write_text("word " * 98)
    turn = session.begin([reader.open(tmp_path / "book.txt", 4)], QUESTION, GREEDY)
    steps = turn.steps()
    next(steps), next(steps)
    assert turn.activity == "reading book.txt" and turn.share == 1 / 10
    session.stop()
    assert list(steps) == [] and turn.finished.is_set()
    assert "Stopped" in shown(turn.message) and 0 < len(session.branch.state) < 100


def test_a_long_document_of_one_keeps_no_other_waiting(model, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(app_sessions, "PIECE", 50)
    (tmp_path / "book.txt").write_text("word " * 400)
    first, second, thread = Session(model, reader), Session(model, reader), ModelThread()
    long = first.begin([reader.open(tmp_path / "book.txt", 4)], "", GREEDY)
    short = second.begin([reader.open(PICTURE, 4)], QUESTION, GREEDY)
    order = []
    for name, turn in (("long", long), ("short", short)):
        finished = turn.finished
        monkeypatch.setattr(finished, "set", lambda set_=finished.set, name=name: (order.append(name), set_()))
        thread.start(turn)
    assert long.finished.wait(60) and short.finished.wait(60)
    assert order == ["short", "long"] and shown(short.message) == "six"


def test_a_failure_of_the_model_is_said_and_the_page_goes_on(session, ask, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(session.branch.state), "ask", lambda *args, **kwargs: 1 / 0)
        assert "division by zero" in ask(QUESTION, PICTURE)
        assert session.branch.messages[-1]["metadata"]["title"] == "Not answered"
    assert ask(QUESTION) == "six"


def test_a_turn_is_finished_even_if_the_state_cannot_be_measured(session, thread, monkeypatch):
    turn = session.begin([], QUESTION, GREEDY)
    monkeypatch.setattr(session.branch, "measure", lambda: 1 / 0)
    thread.start(turn)
    assert turn.finished.wait(60) and not session.busy


class Closable:
    """A session that only says whether it was closed."""

    def __init__(self, busy=False):
        self.busy, self.expires, self.is_closed, self.closed = busy, 0.0, False, threading.Event()

    def close(self):
        self.closed.set()


def test_sessions_are_forgotten_after_their_last_use_and_after_their_tab_is_closed():
    sessions = Sessions(Closable, idle=0.2, closed=0.05)
    left, idle, busy = (sessions.get(name) for name in "abc")
    busy.busy = True
    sessions.leave("a")
    assert left.closed.wait(5) and len(sessions) == 2
    assert idle.closed.wait(5) and not busy.closed.is_set() and len(sessions) == 1  # though nobody asks for anything
    assert sessions.get("d") and len(sessions) == 2
    assert sessions.has_forgotten("a") and sessions.has_forgotten("b") and not sessions.has_forgotten("new")
    assert sessions.get("a") is not left and not sessions.has_forgotten("a")


def test_the_session_that_was_unused_for_the_longest_gives_way_to_a_new_one():
    sessions = Sessions(Closable, most=3)
    busy, used, unused = (sessions.get(name) for name in "abc")
    busy.busy = True
    assert sessions.get("b") is used
    sessions.get("d")
    assert unused.closed.is_set() and sessions.has_forgotten("c") and len(sessions) == 3
    assert sessions.get("a") is busy and sessions.get("b") is used and not busy.closed.is_set()


def test_a_tab_that_comes_back_finds_its_session():
    sessions = Sessions(Closable, idle=60, closed=0.2)
    session = sessions.get("a")
    sessions.leave("a")
    assert sessions.get("a") is session
    time.sleep(0.4)
    assert sessions.get("a") is session and not session.closed.is_set()


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("mmmamba.cli.app.find_spec", lambda name: None)
    assert main(["app"]) == 1
    assert "run `pip install gradio`" in capsys.readouterr().err
    assert main(["app", "nowhere"]) == 1
    assert "nowhere is no model folder" in capsys.readouterr().err


def test_a_model_that_reads_text_only_reads_documents_and_refuses_pictures(tmp_path, thread):
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    reader = Reader(model, load_tokenizer(tmp_path / "ours"), None)
    session = Session(model, reader)
    document = tmp_path / "a.txt"
    document.write_text("The capital is <image>.")
    for path in (PICTURE, tmp_path / "clip.mp4"):
        with pytest.raises(ValueError, match=f"{path.name} is no text, and this model reads text only"):
            reader.open(path, 4)
    turn = session.begin([reader.open(document, 4)], "What is <image>?", GREEDY)
    thread.start(turn)
    assert turn.finished.wait(60)
    question = "The capital is <image>.\n\nWhat is <image>?"
    assert shown(turn.message) == model.chat(reader.tokenizer, None, question, GREEDY)
    session.close()
