"""The command `mmmamba`. Each subcommand imports what it needs when it runs, so that `--help` is instant."""

import argparse
import sys
from importlib import import_module


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence."""

    def error(self, message):
        self.exit(2, f"error: {message}; see `{self.prog} --help`.\n")


def _layer_list(text: str) -> list[int]:
    try:
        return sorted({int(item) for item in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,4,8") from None


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="folder with config.json, safetensors and, if any, the tokenizer"
    )
    parser.add_argument("destination", metavar="DST", help="model folder to make; must not exist")


def _convert(args: argparse.Namespace) -> None:
    from mmmamba.conversion.convert import convert
    from mmmamba.conversion.shards import listed

    report = convert(args.source, args.destination, progress=True)
    for reason in dict.fromkeys(report.left_out.values()):
        names = [name for name in report.left_out if report.left_out[name] == reason]
        print(f"left out: {listed(names, most=3)} ({reason})")
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.tensors} tensors written to {args.destination}")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    # The strategies are spelled out here because importing them would import torch.
    parser.add_argument("teacher", metavar="TEACHER", help="model folder whose layers are all attention")
    parser.add_argument("destination", metavar="DST", help="model folder to make; must not exist")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--linear", action="store_true", help="make every layer Mamba-2")
    which.add_argument("--attention-layers", type=_layer_list, metavar="0,4,…", help="layers that stay attention")
    which.add_argument("--num-attention", type=int, metavar="N", help="how many layers stay attention")
    parser.add_argument(
        "--strategy",
        choices=("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked"),
        help="where the N attention layers stand (default: head-interleaved)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parameters (default: 0)")


def _seed(args: argparse.Namespace) -> None:
    if args.strategy and args.num_attention is None:
        raise ValueError("--strategy places the layers of --num-attention N; give both or neither.")
    from mmmamba.conversion.seeding import seed_folder

    strategy = (args.strategy or "head-interleaved") if args.num_attention is not None else None
    config = seed_folder(
        args.teacher,
        args.destination,
        attention=args.attention_layers or (),
        strategy=strategy,
        num_attention=args.num_attention,
        seed=args.seed,
        progress=True,
    )
    kinds = config.text_config.layer_types
    stay = [str(index) for index, kind in enumerate(kinds) if kind == "full_attention"]
    print(f"{len(kinds) - len(stay)} Mamba-2 layers seeded; attention stays in {', '.join(stay) or 'no layer'}.")
    print(f"written to {args.destination}; it needs distillation before it answers well")


# Name to (help, add_arguments, run) or, for commands that live elsewhere, (help, module with both).
COMMANDS = {
    "chat": ("talk to a model about a picture", "mmmamba.chat_cli"),
    "evaluate": ("score a model on the picture world", "mmmamba.examples.shapes.evaluate"),
    "convert": ("convert a HoVLE or released mmMamba checkpoint into a model folder", _add_convert, _convert),
    "seed": ("make a student with Mamba-2 layers from a teacher", _add_seed, _seed),
    "distill": ("seed a student and train it in three stages", "mmmamba.conversion.distillation.run"),
    "env": ("show what was found here, what is used and why", "mmmamba.env_cli"),
    "bench": ("measure speed and memory beside peers", "mmmamba.benchmarks.bench"),
    "push": ("upload a model folder to the Hugging Face Hub", "mmmamba.conversion.push"),
}


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="mmmamba", description="mmMamba: convert, seed, score and talk to models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, *where) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if len(where) == 2:
            add_arguments, run = where
        elif argv[:1] == [name]:
            module = import_module(where[0])
            add_arguments, run = module.add_arguments, module.run
        else:
            continue
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command line without the program's name; that of the process if not given.

    Returns:
        The exit code: 0 when all went well, 1 when not (after one sentence on stderr), 130 when interrupted. A wrong
        command line exits with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = _parser(argv)
        args, more = parser.parse_known_args(argv)
        # argparse takes KEY=VALUE before options only.
        if more and hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in more):
            args.overrides += more
        elif more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # A strict config wraps the sentence that says what is wrong.
        cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else error
        if not isinstance(cause, ValueError | TypeError | OSError | ImportError):
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
