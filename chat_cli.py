"""`mmmamba chat`: look at a picture with a model, ask, read the answer as it comes."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextStreamer

from .conversation_mmmamba import ConversationState
from .conversion.publish import check_model_folder
from .env_cli import usable_device
from .image_processing_mmmamba import MmMambaImageProcessorPil
from .modeling_mmmamba import MmMambaForConditionalGeneration
from .tokenization_mmmamba import MmMambaTokenizer


DEMO = Path(__file__).parent / "examples" / "shapes" / "hybrid"
DEMO_CONVERSATION = 6  # of the held-out stream: counting, reading and looking for a place


class Streamer(TextStreamer):
    """Writes the answer to the terminal as it grows; nothing of the prompt, no special tokens."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mmmamba chat`."""
    parser.add_argument("question", nargs="?", help="ask this and stop; without it, ask as long as you like")
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of a model (default: the shapes hybrid)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="a picture; may be given several times"
    )
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="a text to read first, however long; may be repeated"
    )
    parser.add_argument(
        "--state", type=Path, help="file of a kept conversation: gone on with if it is there, written at the end"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba chat`. Raises ValueError for a folder or a picture that cannot be used."""
    check_model_folder(args.model)
    usable_device(args.device)
    pictures, documents = [open_picture(path) for path in args.image], [open_text(path) for path in args.text]
    if args.state is not None and not args.state.resolve().parent.is_dir():
        raise ValueError(f"--state {args.state} is in a folder that does not exist; make the folder.")
    chat = Chat(args.model, args.device, args.max_new_tokens)
    if args.state is not None and args.state.exists():
        if pictures or documents:
            raise ValueError(f"--state {args.state} holds a conversation already; give no --image and no --text.")
        chat.state = ConversationState.load(args.state, chat.model, chat.tokenizer)
    elif args.question is None and not pictures and not documents and args.model == DEMO:
        demonstrate(chat)
    else:
        if args.question is None:
            for path, picture in zip(args.image, pictures, strict=True):
                show(picture, path)
        chat.look_at(pictures, documents)
    try:
        if args.question is None:
            talk(chat, forget=args.state is None)
        else:
            chat.ask(args.question)
    finally:
        if args.state is not None:  # whatever happened since: what was read is worth keeping
            chat.keep(args.state)


def open_picture(path: Path) -> Image.Image:
    """A picture from a file. Raises ValueError if it is missing, truncated or no picture."""
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise ValueError(f"--image {path} does not exist; give the path of a picture.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--image {path} cannot be read as a picture ({error}); give a whole image file.") from None
    return picture


def open_text(path: Path) -> str:
    """A text from a file. Raises ValueError if it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--text {path} does not exist; give the path of a text.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--text {path} cannot be read as UTF-8 text ({error}); convert it first.") from None


class Chat:
    """A model and a conversation with it."""

    def __init__(self, folder: Path, device: str, max_new_tokens: int):
        # Many processors have no instructions for half precision; fp32 runs well on all.
        dtype = torch.float32 if device == "cpu" else "auto"
        self.model = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.tokenizer = MmMambaTokenizer.from_pretrained(folder)
        self.image_processor = MmMambaImageProcessorPil.from_pretrained(folder)
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.look_at([])

    def look_at(self, pictures: list[Image.Image], documents: Sequence[str] = ()) -> None:
        """Forgets what was said, reads these texts and turns to these pictures."""
        self.state, self.tiles, self.counts = self.model.conversation(self.tokenizer), None, []
        self.add(pictures)
        for document in documents:
            self.state.extend(document.replace("<image>", "<image >").rstrip() + "\n\n")

    def add(self, pictures: list[Image.Image]) -> None:
        """Shows more pictures; they go before the next question, or where it says `<image>`."""
        if pictures:
            inputs = self.image_processor(pictures, return_tensors="pt")
            tiles = inputs["pixel_values"]
            self.tiles = tiles if self.tiles is None else torch.cat([self.tiles, tiles])
            self.counts = self.counts + inputs["num_patches"].tolist()

    def keep(self, file: Path) -> None:
        """Writes the conversation to a file, pictures that were not asked about included."""
        if self.counts:
            self.state.extend("<image>" * len(self.counts) + "\n", self.tiles, self.counts)
            self.tiles, self.counts = None, []
        self.state.save(file)
        print(f"kept in {file}: {len(self.state):,} tokens in {self.state.nbytes / 2**20:.1f} MiB")

    def ask(self, question: str, remember: bool = True) -> str:
        """Streams the answer to the terminal and returns it."""
        if not question.replace("<image>", "").strip():
            raise ValueError("The question is empty; ask something.")
        if self.counts and "<image>" not in question:
            question = "<image>" * len(self.counts) + "\n" + question
        state = self.state if remember else self.state.fork()
        answer = state.ask(question, self.options, self.tiles, self.counts, Streamer(self.tokenizer))
        if remember:
            self.tiles, self.counts = None, []
        return answer


def demonstrate(chat: Chat) -> None:
    """Shows a picture that the model was never trained on and asks three questions whose answers are known."""
    from .examples.shapes.world import conversation

    pictures, turns = conversation("test", 0, DEMO_CONVERSATION)
    picture = pictures[0].draw()
    path = Path(tempfile.mkdtemp(prefix="mmmamba-")) / "picture.png"
    enlarged = picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST)
    enlarged.save(path)
    print("A small mmMamba (hybrid: Mamba-2 and attention layers) looks at a picture it was never trained on.\n")
    show(enlarged, path)
    chat.look_at([picture])
    for question, truth in turns[:3]:
        print(f"> {question}", flush=True)
        chat.ask(question, remember=False)
        print(f"  (right: {truth})\n")


def talk(chat: Chat, forget: bool = True) -> None:
    """Answers what the user types until they stop; a new picture begins anew, or (not `forget`) joins the others."""
    if not sys.stdin.isatty():
        return
    turns = "turns to another picture" if forget else "adds a picture"
    print(f"Your turn. An empty line or Ctrl-D ends the talk; /image FILE {turns}.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        try:
            if line.startswith("/image "):
                path = Path(line.removeprefix("/image ").strip())
                picture = open_picture(path)
                show(picture, path)
                (chat.look_at if forget else chat.add)([picture])
            else:
                chat.ask(line)
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(the answer was stopped and is forgotten)")


def show(picture: Image.Image, path: Path) -> None:
    """Says where a picture is and draws it small if the terminal has colours: two pixels to a character."""
    print(f"{path} ({picture.width} x {picture.height} pixels)")
    if not sys.stdout.isatty():
        return
    width = min(picture.width, shutil.get_terminal_size().columns - 2, 72)
    height = max(2, round(picture.height * width / picture.width / 2) * 2)
    pixels = picture.convert("RGB").resize((width, height)).load()
    for y in range(0, height, 2):
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pixels[x, y], *pixels[x, y + 1]) for x in range(width))
        print("".join(cells) + "\x1b[0m")
    print()
