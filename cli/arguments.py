"""The arguments of each command, declared without importing torch so that `--help` answers at once."""

import argparse
from pathlib import Path

from mmmamba.serving.limits import Limits


SHAPES = Path(__file__).parent.parent / "examples" / "shapes"
HYBRID = SHAPES / "hybrid"


def chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", help="ask this and stop; without it, ask as long as you like")
    parser.add_argument("--model", type=Path, default=HYBRID, help="model folder (default: the small hybrid)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file; may be repeated")
    parser.add_argument(
        "--video", type=path_or_address, action="append", default=[], help="video file or address; may be repeated"
    )
    parser.add_argument("--num-frames", type=int, metavar="N", help="frames to read of each video (default: 8)")
    parser.add_argument("--fps", type=float, help="read each video whole, so many frames of each second")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="text file of any length to read first; may be repeated",
    )
    parser.add_argument("--state", type=Path, help="conversation file: continued if it exists, saved at the end")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, help="longest answer, in tokens (default: 256)"
    )
    device(parser)


def path_or_address(text: str) -> Path | str:
    """A path, or an address such as https://…, which a path would change."""
    return text if "://" in text else Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    try:
        if (number := int(text)) > 0:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")


def device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if available)")


def app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="DIR", nargs="?", type=Path, default=HYBRID, help="model folder (default: the small hybrid)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=positive, default=7860, help="port to listen on (default: 7860)")
    device(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=HYBRID, help="model folder (default: the small hybrid)")
    parser.add_argument("--questions", type=positive, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="folder with config.json, safetensors and, if any, the tokenizer; or a GGUF file"
    )
    parser.add_argument("destination", metavar="DST", help="model folder to make; must not exist")
    parser.add_argument(
        "--vision",
        type=int,
        metavar="N",
        help="let a language model read pictures: add a patch embedding and N embedding layers, to be trained",
    )
    parser.add_argument("--image-size", type=positive, help="with --vision: pixels of a tile's side (default: 448)")
    parser.add_argument("--patch-size", type=positive, help="with --vision: pixels of a patch's side (default: 14)")


def seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="model folder whose layers are all attention")
    parser.add_argument("destination", metavar="DST", help="model folder to make; must not exist")
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument("--linear", action="store_true", help="make every layer Mamba-2")
    layers.add_argument("--attention-layers", type=_layer_list, metavar="0,4,…", help="layers that stay attention")
    layers.add_argument("--num-attention", type=int, metavar="N", help="how many layers stay attention")
    parser.add_argument(
        "--strategy",
        choices=("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked"),
        help="where the N attention layers stand (default: head-interleaved)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parameters (default: 0)")


def _layer_list(text: str) -> list[int]:
    try:
        return sorted({int(item) for item in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,4,8") from None


def quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DIR", help="model folder with weights in floating point")
    parser.add_argument("destination", metavar="DST", help="model folder to make; must not exist")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), required=True, help="of each weight of a linear layer, beside its scale"
    )


def distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a recipe of the package, e.g. shapes-linear")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as stage_3.steps=100 output=runs/mine")
    parser.add_argument(
        "--cost",
        type=int,
        metavar="TOKENS",
        help="only compute time, memory and disk, for conversations of so many tokens",
    )
    parser.add_argument(
        "--check-data",
        type=positive,
        metavar="N",
        help="only read N rows: how many are bad and why, how long they are; needs no weights",
    )
    parser.add_argument("--only", choices=("seed", "1", "2", "3", "4", "export"), help="run this step alone")


def push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    parser.add_argument("repo", metavar="REPO", help="its name on the Hub: user/name")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; made if it is not there")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--space", metavar="REPO", help="after it, make a Space of this name, user/name: a page that shows the model"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the folder, list what would go, send nothing")


def serve(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # `--ap KEY` would not be known for a key and stay on the command line
    parser.usage = "mmmamba serve [DIR] [options] [-- options of vLLM]"
    parser.add_argument(
        "model", metavar="DIR", type=Path, nargs="?", default=HYBRID, help="model folder (default: the small hybrid)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=port, default=8000, help="8000 if not given; 0 takes a free one")
    parser.add_argument(
        "--engine", choices=("auto", "vllm", "transformers"), default="auto", help="vLLM if it is installed (default)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", type=nonempty, help="that requests must have (default: $MMMAMBA_API_KEY, if set)"
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", nargs="+", help="for requests (default: the folder's name and its path)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )
    parser.add_argument("--device", help="of the engine transformers: cpu, cuda:1, … (default: cuda if available)")
    parser.add_argument(
        "--shutdown-timeout",
        metavar="SECONDS",
        type=positive,
        default=60,
        help="for answers after SIGTERM (default: 60)",
    )
    limits = parser.add_argument_group("limits of one request")
    for name, what in (
        ("max_request_bytes", "its body, and all that its addresses bring"),
        ("max_image_bytes", "a picture's file"),
        ("max_image_pixels", "width x height of a picture, or of a video's frames"),
        ("max_request_pixels", "all pictures and frames of videos together"),
    ):
        option, default = "--" + name.replace("_", "-"), getattr(Limits, name)
        limits.add_argument(option, metavar="N", type=positive, default=default, help=f"{what} (default: {default:,})")
    limits.add_argument(
        "--allowed-media-domains",
        metavar="HOST",
        nargs="*",
        help="fetch from these hosts only; from none if no name follows (default: hosts on the public internet)",
    )
    limits.add_argument(
        "--allowed-local-media-path", metavar="DIR", type=Path, help="read file://… in this folder (default: no files)"
    )


def port(text: str) -> int:
    """A TCP port, from the command line."""
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port, which is a number from 0 to 65535")


def nonempty(text: str) -> str:
    """A text that is not empty, from the command line."""
    if text:
        return text
    raise argparse.ArgumentTypeError("it is empty")


def env(parser: argparse.ArgumentParser) -> None:
    """`mmmamba env` has no arguments."""
