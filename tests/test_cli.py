"""The command line: one sentence for what goes wrong, a folder for what goes right."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from golden_checkpoints import checkpoint

import mmmamba
import mmmamba.cli.main as main_module
from mmmamba.cli.arguments import seed as add_seed_arguments
from mmmamba.cli.main import COMMANDS, main
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.seeding import STRATEGIES
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


def failed(capsys, *argv):
    """Runs a command that must fail; returns (exit code, its one line on stderr)."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines(keepends=True)
    message = "".join(line for line in lines if "Loading weights" not in line).lstrip("\r")  # a progress bar
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return code, message


HELP_OF_EVERY_COMMAND = """
import sys
from mmmamba.cli.main import COMMANDS, main
for command in ([], *([name] for name in COMMANDS)):
    try:
        main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_help_of_every_command_needs_no_import_of_torch():
    command = [sys.executable, "-c", HELP_OF_EVERY_COMMAND]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in COMMANDS:
        assert f"\n    {name} " in shown and f"usage: mmmamba {name}" in shown
    assert "--num-attention" in shown and "--dry-run" in shown


def test_the_command_offers_every_strategy():
    """Its arguments are declared without importing seeding, and torch with it."""
    parser = ArgumentParser()
    add_seed_arguments(parser)
    (strategy,) = (action for action in parser._actions if action.dest == "strategy")
    assert strategy.choices == STRATEGIES


def test_python_dash_m_runs_the_same_command():
    shown = subprocess.run([sys.executable, "-m", "mmmamba", "seed", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--num-attention" in shown.stdout


def test_keys_may_stand_behind_options(capsys):
    assert main(["distill", "hovle-hybrid", "--cost", "2000", "teacher=mmmamba:."]) == 0
    assert "12.80" in capsys.readouterr().out
    assert failed(capsys, "distill", "hovle-hybrid", "--cost", "2000", "--teacher=x")[0] == 2
    assert failed(capsys, "seed", "a", "b", "--linear", "x=y")[0] == 2


def test_convert_then_seed(tmp_path, capsys):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    assert main(["convert", str(source), str(tmp_path / "teacher")]) == 0
    printed = capsys.readouterr().out
    assert "left out: embedding_model.vision_embeddings.class_embedding" in printed and "114 tensors" in printed
    for arguments, attention in (
        (["--linear"], []),
        (["--attention-layers", "0,4,8"], [0, 4, 8]),
        (["--num-attention", "3"], [0, 4, 8]),
        (["--num-attention", "2", "--strategy", "tail-stacked"], [10, 11]),
    ):
        folder = tmp_path / "-".join(["student", *arguments])
        assert main(["seed", str(tmp_path / "teacher"), str(folder), *arguments, "--seed", "1"]) == 0
        kinds = json.loads((folder / "config.json").read_text())["text_config"]["layer_types"]
        assert [index for index, kind in enumerate(kinds) if kind == "full_attention"] == attention


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "required"),
        (["fly"], "fly"),
        (["convert", "here"], "DST"),
        (["seed", "a", "b"], "--linear"),
        (["seed", "a", "b", "--linear", "--num-attention", "3"], "not allowed"),
        (["seed", "a", "b", "--attention-layers", "0,x"], "0,x"),
        (["seed", "a", "b", "--num-attention", "3", "--strategy", "middle"], "middle"),
    ],
)
def test_wrong_command_lines_exit_with_two(arguments, word, capsys):
    code, message = failed(capsys, *arguments)
    assert code == 2 and word in message


def test_failures_exit_with_one_and_one_sentence(tmp_path, capsys):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    assert failed(capsys, "convert", tmp_path / "none", tmp_path / "out")[0] == 1
    assert failed(capsys, "convert", source, source) == (
        1,
        f"error: {source} exists; name a folder that does not, or remove this one.\n",
    )
    assert "mmmamba convert" in failed(capsys, "seed", source, tmp_path / "out", "--linear")[1]
    assert (
        "--strategy" in failed(capsys, "seed", source, tmp_path / "out", "--linear", "--strategy", "head-stacked")[1]
    )
    (source / "config.json").write_text('{"model_type": "mmmamba", "text_config": {"hidden_size": "wide"}}')
    assert "hidden_size" in failed(capsys, "seed", source, tmp_path / "out", "--linear")[1]
    (source / "config.json").write_text("{")
    assert "not readable JSON" in failed(capsys, "convert", source, tmp_path / "out")[1]
    assert not (tmp_path / "out").exists()


class Terminated(BaseException):
    """What a launcher does to other processes when the first one has failed."""


def test_the_first_process_of_a_launcher_says_what_is_wrong_with_all(tmp_path, capsys, monkeypatch):
    def terminated(seconds):
        raise Terminated

    monkeypatch.setattr(main_module.time, "sleep", terminated)
    command = ["distill", str(tmp_path / "none.yaml")]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Terminated):
        main(command)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, message = failed(capsys, *command)
    assert code == 1 and message.startswith("error: There is no recipe ")


@pytest.mark.parametrize("error", [ValueError("only here"), RuntimeError("only here")])
def test_what_fails_in_another_process_alone_is_said_there(error, capsys, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(main_module, "SECONDS_BEHIND_THE_FIRST", 0)
    monkeypatch.setattr("mmmamba.cli.env.run", run)
    if isinstance(error, ValueError):
        assert failed(capsys, "env") == (1, "error: only here\n")
    else:
        with pytest.raises(RuntimeError, match="only here"):
            main(["env"])


TEACHER = Path(mmmamba.__file__).parent / "examples" / "shapes" / "teacher"
PICTURE = TEACHER.parent / "picture.png"


def test_one_question_about_a_picture(capsys):
    assert main(["chat", "--model", str(TEACHER), "--image", str(PICTURE), "How many objects are there?"]) == 0
    assert capsys.readouterr().out.strip() == "six"


def test_pictures_stand_where_the_question_says(capsys):
    ask = ["chat", "--model", str(TEACHER), "--image", str(PICTURE)]
    assert main([*ask, "<image>\nHow many objects are there?"]) == 0
    assert capsys.readouterr().out.strip() == "six"


def test_a_conversation_goes_on_in_another_process(tmp_path, capsys):
    text, state = tmp_path / "text.txt", tmp_path / "state.safetensors"
    text.write_text("Nothing of interest. ")
    ask = ["chat", "--model", str(TEACHER), "--state", str(state)]
    assert main([*ask, "--text", str(text), "--image", str(PICTURE), "How many objects are there?"]) == 0
    first = capsys.readouterr().out
    assert f"saved to {state}: " in first and " tokens in " in first
    assert main([*ask, "How many objects are there?"]) == 0
    tokens = [int(out.split(": ")[-1].split()[0].replace(",", "")) for out in (first, capsys.readouterr().out)]
    assert tokens[1] > tokens[0] > 40


def test_a_saved_conversation_includes_pictures_nobody_has_asked_about(tmp_path, capsys):
    state = tmp_path / "state.safetensors"
    chat = ["chat", "--model", str(TEACHER), "--state", str(state)]
    question = "How many objects are there?"
    assert main([*chat, "--image", str(PICTURE)]) == 0  # nobody at the keyboard
    assert main([*chat, question]) == 0
    answer = capsys.readouterr().out.splitlines()[-2]
    assert main(["chat", "--model", str(TEACHER), "--image", str(PICTURE), question]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == answer != ""


def test_a_saved_chat_adds_pictures_and_survives_ctrl_c(tmp_path, capsys, monkeypatch):
    state = tmp_path / "state.safetensors"
    lines = iter(["Hello", f"/image {PICTURE}", "stop", "How many objects are there?", ""])
    monkeypatch.setattr(sys, "stdin", type("Keyboard", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    ask = ConversationState.ask

    def interrupted(self, question, *arguments):
        if question.endswith("stop"):
            raise KeyboardInterrupt
        return ask(self, question, *arguments)

    monkeypatch.setattr(ConversationState, "ask", interrupted)
    assert main(["chat", "--model", str(TEACHER), "--state", str(state)]) == 0
    printed = capsys.readouterr().out
    assert "adds a picture" in printed and "interrupted" in printed
    model, tokenizer = (auto.from_pretrained(TEACHER) for auto in (MmMambaForConditionalGeneration, MmMambaTokenizer))
    saved = ConversationState.load(state, model, tokenizer)
    assert saved.turns == 2 and model.config.image_token_id in saved.ids


def test_what_chat_cannot_use_is_named(tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    ask = ("chat", "--model", TEACHER)
    for arguments, words in (
        (["chat", "--model", tmp_path, "Why?"], "no config.json"),
        (["chat", "--model", tmp_path / "llama", "Why?"], "model_type='llama'"),
        (["evaluate", "--model", tmp_path / "llama"], "model_type='llama'"),
        ([*ask, "--image", tmp_path / "none.png", "Why?"], "none.png does not exist"),
        (
            [*ask, "--image", tmp_path / "cut.png", "Why?"],
            "cut.png cannot be opened as a picture (image file is truncated",
        ),
        ([*ask, "--image", tmp_path / "text.png", "Why?"], "text.png cannot be opened as a picture (its format"),
        ([*ask, "--image", PICTURE, " "], "question is empty"),
        ([*ask, "--image", PICTURE, "<image> and <image>"], "2 <image> placeholders"),
        ([*ask, "--device", "tpu", "Why?"], "--device tpu cannot be used"),
        ([*ask, "--text", tmp_path / "none.txt", "Why?"], "none.txt does not exist"),
        ([*ask, "--text", PICTURE, "Why?"], "picture.png cannot be read as UTF-8"),
        ([*ask, "--state", tmp_path / "none" / "x", "Why?"], "in a folder that does not exist"),
        ([*ask, "--state", tmp_path / "text.png", "Why?"], "text.png is not a whole safetensors file"),
        ([*ask, "--state", tmp_path / "text.png", "--image", PICTURE, "Why?"], "holds a conversation already"),
    ):
        assert words in failed(capsys, *arguments)[1]
