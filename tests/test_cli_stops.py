"""The command line when it is terminated, asked for help, or given what it cannot use: it cleans up and says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden_checkpoints import checkpoint

import mmmamba
from mmmamba.cli import chat
from mmmamba.cli.main import main
from mmmamba.conversion.publish import whole_folder
from mmmamba.tokenization_mmmamba import PLAIN_TEXT_MARK


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"
TEACHER, HYBRID = SHAPES / "teacher", SHAPES / "hybrid"

# Runs a command that stops in the middle of writing, so that it can be killed there.
WRITE_SLOWLY = """
import sys, time
from mmmamba.cli.main import main
from mmmamba.conversion import shards

def write(self, name, tensor):
    print("writing", flush=True)
    time.sleep(60)

shards.ShardWriter.write = write
sys.exit(main(sys.argv[1:]))
"""


def stopped(folder, number, *arguments):
    """Ends a command by a signal while it writes. Returns its exit code and what it said."""
    command = [sys.executable, "-c", WRITE_SLOWLY, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "writing":
        assert process.poll() is None, process.stderr.read()
    assert any(".unfinished-" in path.name for path in folder.rglob("*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def commands(folder):
    source = checkpoint(folder / "src", "hovle_tiny")
    return {
        "convert": ("convert", source, folder / "out"),
        "seed": ("seed", TEACHER, folder / "out", "--linear"),
        "distill": ("distill", "shapes-linear", f"output={folder / 'run'}"),
    }


@pytest.mark.parametrize("name", ["convert", "seed", "distill"])
def test_a_terminated_command_leaves_no_half_written_folder(name, tmp_path):
    code, errors = stopped(tmp_path, signal.SIGTERM, *commands(tmp_path)[name])
    assert code == 128 + signal.SIGTERM and "error: terminated" in errors and "Traceback" not in errors
    assert not [path for path in tmp_path.rglob("*") if ".unfinished-" in path.name]
    assert not (tmp_path / "out").exists()


def test_what_a_killed_conversion_left_blocks_no_later_one(tmp_path):
    arguments = commands(tmp_path)["convert"]
    assert stopped(tmp_path, signal.SIGKILL, *arguments)[0] == -signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out.unfinished-")]
    assert main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unfinished_folders_have_random_names(tmp_path):
    names = set()
    for _ in range(3):
        with pytest.raises(KeyError), whole_folder(tmp_path / "out") as folder:
            names.add(folder.name)
            raise KeyError
    assert len(names) == 3 and not any(str(os.getpid()) in name for name in names)


def test_signals_are_as_before_after_a_command(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["env"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


COMMANDS_WITH_HELP = [
    *(["chat"], ["evaluate"], ["convert"], ["seed"], ["distill"], ["env"], ["bench"], ["push"]),
    *(["bench", name] for name in ("scan", "decode", "prefill", "memory", "distillation", "laptop")),
]
IMPORTS_OF_HELP = """
import sys
from mmmamba.cli.main import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as stop:
    assert stop.code == 0
slow = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "yaml"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize("command", COMMANDS_WITH_HELP, ids=" ".join)
def test_help_imports_nothing_that_takes_long(command):
    done = subprocess.run([sys.executable, "-c", IMPORTS_OF_HELP, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: mmmamba {' '.join(command)}")


def failed(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2) and last.startswith("error: ") and last.isprintable()
    return last


def test_options_that_cannot_be_used_are_refused(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    ask = ("chat", "--model", TEACHER)
    for arguments, words in (
        ((*ask, "--device", "meta", "Why?"), "--device meta cannot be used here"),
        ((*ask, "--device", "hpu", "Why?"), "--device hpu cannot be used here"),
        ((*ask, "--max-new-tokens", "-1", "Why?"), "'-1' is not a whole number of at least 1"),
        ((*ask, "--max-new-tokens", "0", "Why?"), "'0' is not a whole number of at least 1"),
        (("evaluate", "--questions", "-5"), "'-5' is not a whole number of at least 1"),
        (("bench", "scan", "--rounds", "0"), "'0' is not a whole number of at least 1"),
        ((*ask, "--image", tmp_path / "pipe", "Why?"), "pipe or device"),
        ((*ask, "--image", tmp_path, "Why?"), "it is a folder"),
        ((*ask, "--state", tmp_path / "pipe", "Why?"), "pipe or device"),
        ((*ask, "--image", tmp_path / "\x1b[31mred", "Why?"), r"\x1b[31mred does not exist"),
        ((*ask, "a\ud800b"), "lone surrogate"),
        ((*ask, "What does <image> mean?"), "1 <image> placeholders but there are 0 pictures"),
    ):
        assert words in failed(capsys, *arguments)


def test_a_placeholder_in_a_document_is_read_as_it_is_written():
    talk = chat.Chat(HYBRID, "cpu", 4, {})
    text = "HTML has <img> and some have <image>. So it is."
    talk.start(texts=[text])
    read = talk.tokenizer.decode(talk.state.ids) + talk.state.pending
    assert text in read.replace(PLAIN_TEXT_MARK, "")
    control = talk.tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>"])
    assert not {*control} & {*talk.state.ids}


def test_a_damaged_chat_template_is_one_sentence(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in HYBRID.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    for template in (
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{{ raise_exception('no') }}",
        "{{ none + 1 }}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        assert "chat template cannot be rendered" in failed(capsys, "chat", "--model", folder, "Why?")
