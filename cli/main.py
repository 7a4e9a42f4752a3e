"""The command `mmmamba`. A command's code, and torch with it, is imported only when the command runs."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from mmmamba.benchmarks import bench

from . import arguments


# Name to help, declaration of the arguments, and the module whose run(args) runs the command.
COMMANDS = {
    "chat": ("talk to a model about pictures, videos and texts", arguments.chat, "mmmamba.cli.chat"),
    "app": ("open a page to talk to a model in the browser", arguments.app, "mmmamba.cli.app"),
    "evaluate": ("score a model on the picture world", arguments.evaluate, "mmmamba.examples.shapes.evaluate"),
    "convert": (
        "convert a HoVLE, released mmMamba or Llama-shaped checkpoint into a model folder",
        arguments.convert,
        "mmmamba.cli.convert",
    ),
    "seed": ("make a student with Mamba-2 layers from a teacher", arguments.seed, "mmmamba.cli.seed"),
    "distill": (
        "seed a student and train it in stages",
        arguments.distill,
        "mmmamba.conversion.distillation.run",
    ),
    "quantize": ("store a model's linear layers in 4 or 8 bits", arguments.quantize, "mmmamba.cli.quantize"),
    "env": ("show packages and devices, which implementations are used and why", arguments.env, "mmmamba.cli.env"),
    "bench": ("measure speed and memory beside peers", bench.add_arguments, "mmmamba.benchmarks.bench"),
    "serve": ("serve a model behind OpenAI's API", arguments.serve, "mmmamba.cli.serve"),
    "push": ("upload a model folder to the Hugging Face Hub", arguments.push, "mmmamba.conversion.push"),
}

SECONDS_BEHIND_THE_FIRST = 30  # a busy machine takes long to end a process


class CommandParser(argparse.ArgumentParser):
    """Declares its arguments when its command is the one given, and reports a wrong command line in one sentence.

    Args:
        declare: Adds the arguments to the parser.
    """

    def __init__(self, *args, declare: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._declare = declare

    def parse_known_args(self, args=None, namespace=None):
        if self._declare is not None:
            self._declare(self)
            self._declare = None
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {message}; see `{self.prog} --help`.\n")


def _parser() -> CommandParser:
    parser = CommandParser(prog="mmmamba", description="mmMamba: convert, seed, score and talk to models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, declare, module) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, declare=declare)
        command.set_defaults(module=module)
    return parser


def _is_first_process() -> bool:
    """Whether this process is the first that a launcher, such as `torchrun`, has started on this machine, or alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into SystemExit, so that what a command has begun to write is removed."""

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        if _is_first_process():
            print("error: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Whoever handles or ignores them already, as `nohup` does, knows better; and only the main thread can.
    if threading.current_thread() is not threading.main_thread():
        signals = []
    signals = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in signals:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command line without the program's name; that of the process if not given.

    Returns:
        The exit code: 0 when all went well, 1 when not (after one sentence on stderr), 130 when interrupted, 143 when
        terminated. A wrong command line exits with 2.
    """
    try:
        parser = _parser()
        argv = sys.argv[1:] if argv is None else argv
        # What follows -- is for the engine of `serve`, and may look like our own options.
        end = argv.index("--") if argv[:1] == ["serve"] and "--" in argv else len(argv)
        args, more = parser.parse_known_args(argv[:end])
        args.engine_arguments = argv[end + 1 :]
        # argparse takes KEY=VALUE before options only.
        if more and hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in more):
            args.overrides += more
        elif more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        with _clean_up_when_terminated():
            return import_module(args.module).run(args) or 0
    except KeyboardInterrupt:
        if _is_first_process():
            print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_first_process():
            # If the first process fails, too, it says why, and its launcher ends this one meanwhile.
            time.sleep(SECONDS_BEHIND_THE_FIRST)
        # A strict config wraps the sentence that says what is wrong.
        cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else error
        if not isinstance(cause, ValueError | TypeError | OSError | ImportError):
            raise
        # One line, without control characters, whatever a file's contents have brought into the message.
        message = " ".join(str(cause).splitlines())
        print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
