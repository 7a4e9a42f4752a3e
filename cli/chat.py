"""`mmmamba chat`: shows pictures, videos and texts to a model, asks it, and prints its answers as they grow."""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from mmmamba import image_reading_mmmamba
from mmmamba.chat_template_mmmamba import as_text
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.publish import check_model_folder
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.examples.shapes.world import conversation
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.tokenization_mmmamba import load_tokenizer
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
from mmmamba.video_reading_mmmamba import check_sampling

from .arguments import HYBRID, path_or_address
from .env import usable_device
from .load import load_model
from .video import check_video, read_video


DEMO_CONVERSATION = 6  # index in the held-out split; it asks for a count, a number and a position


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba chat`. Raises ValueError for a folder or a file that cannot be used."""
    check_model_folder(args.model)
    device = usable_device(args.device)
    images, texts = [read_image(path) for path in args.image], [read_text(path) for path in args.text]
    check_sampling(args.num_frames, args.fps)
    if args.question is not None and not args.video and (args.num_frames is not None or args.fps is not None):
        raise ValueError("--num-frames and --fps say how to read a video; give --video FILE, too, or leave them out.")
    for path in args.video:
        check_video(path)
    if args.state is not None and not args.state.resolve().parent.is_dir():
        raise ValueError(f"--state {args.state} is in a folder that does not exist; make the folder.")
    chat = Chat(args.model, device, args.max_new_tokens, {"num_frames": args.num_frames, "fps": args.fps})
    if args.state is not None and args.state.exists():
        if images or texts or args.video:
            raise ValueError(
                f"--state {args.state} holds a conversation already; give no --image, no --video and no --text."
            )
        chat.state = ConversationState.load(args.state, chat.model, chat.tokenizer)
    elif args.question is None and not images and not texts and not args.video and args.model == HYBRID:
        run_demo(chat)
    else:
        if args.question is None:
            for path, image in zip(args.image, images, strict=True):
                print_image(image, path)
        chat.start(images, texts)
        for path in args.video:
            chat.read_video(path)
    try:
        if args.question is None:
            read_questions(chat, new_image_restarts=args.state is None)
        else:
            chat.ask(args.question)
    finally:
        if args.state is not None:  # also after an error: reading a long text again would take long
            chat.save(args.state)


def read_image(path: Path) -> Image.Image:
    """An image from a file, upright, in RGB. Raises ValueError if it is missing, damaged or not an image."""
    if not os.path.exists(path):
        raise ValueError(f"--image {path} does not exist; give the path of an image.")
    try:
        return image_reading_mmmamba.read_image(path)
    except ValueError as error:
        raise ValueError(f"--image {error}") from None


def read_text(path: Path) -> str:
    """A text from a file. Raises ValueError if it is missing or not UTF-8."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"--text {path} is a folder, pipe or device; give the path of a text.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--text {path} does not exist; give the path of a text.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--text {path} cannot be read as UTF-8 text ({error}); convert it first.") from None


class Chat:
    """A model and a conversation with it.

    Args:
        folder: Model folder.
        device: Where the model runs; in fp32 on the CPU, elsewhere or quantised in the dtype of its weights.
        max_new_tokens: Longest answer.
        sampling: How many frames to take of videos, `num_frames` or `fps`; as the folder says if neither is given.
    """

    def __init__(
        self, folder: Path, device: torch.device | str, max_new_tokens: int, sampling: dict[str, float | None]
    ):
        # Many CPUs have no instructions for half precision.
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        self.model = load_model(folder, device, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.reads_pictures = self.model.config.vision_config is not None
        if self.reads_pictures:
            self.image_processor = MmMambaImageProcessorPil.from_pretrained(folder)
            self.video_processor = MmMambaVideoProcessor.from_pretrained(folder)
        self.sampling = sampling
        self.generation_config = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.start()

    def start(self, images: Sequence[Image.Image] = (), texts: Sequence[str] = ()) -> None:
        """Starts a new conversation; the model reads the texts now and the images with the next question."""
        self.state = self.model.conversation(self.tokenizer)
        self.pixel_values, self.num_patches_list = None, []
        self.add_images(images)
        for text in texts:
            # What looks like a placeholder in a document is text.
            self.state.extend(as_text(text.rstrip() + "\n\n", self.tokenizer))

    def add_images(self, images: Sequence[Image.Image]) -> None:
        """Adds images to the next question: in front of it, or where it says `<image>`."""
        if images:
            self._check_pictures()
            inputs = self.image_processor(list(images), return_tensors="pt")
            tiles = inputs["pixel_values"]
            self.pixel_values = tiles if self.pixel_values is None else torch.cat([self.pixel_values, tiles])
            self.num_patches_list = self.num_patches_list + inputs["num_patches"].tolist()

    def read_video(self, path: Path) -> None:
        """Shows a video; the model reads it now."""
        self._check_pictures()
        read_video(self.state, self.video_processor, path, **self.sampling)

    def _check_pictures(self) -> None:
        if not self.reads_pictures:
            raise ValueError("This model reads text only; leave out pictures and videos.")

    def ask(self, question: str, remember: bool = True) -> str:
        """Prints the answer while it is generated and returns it.

        Args:
            question: It may say `<image>` once per image that was added.
            remember: Whether question and answer become part of the conversation.
        """
        if not question.replace("<image>", "").strip():
            raise ValueError("The question is empty; ask something.")
        if self.num_patches_list and "<image>" not in question:
            question = "<image>" * len(self.num_patches_list) + "\n" + question
        state = self.state if remember else self.state.fork()
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = state.ask(question, self.generation_config, self.pixel_values, self.num_patches_list, streamer)
        if remember:
            self.pixel_values, self.num_patches_list = None, []
        return answer

    def save(self, file: Path) -> None:
        """Saves the conversation to a file, with images that no question was asked about yet."""
        if self.num_patches_list:
            placeholders = "<image>" * len(self.num_patches_list) + "\n"
            self.state.extend(placeholders, self.pixel_values, self.num_patches_list)
            self.pixel_values, self.num_patches_list = None, []
        self.state.save(file)
        print(f"saved to {file}: {len(self.state):,} tokens in {self.state.nbytes / 2**20:.1f} MiB")


def run_demo(chat: Chat) -> None:
    """Shows a held-out picture of the shapes world and asks three questions whose answers are known."""
    pictures, turns = conversation("test", 0, DEMO_CONVERSATION)
    image = pictures[0].draw()
    path = Path(tempfile.mkdtemp(prefix="mmmamba-")) / "picture.png"
    enlarged = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
    enlarged.save(path)
    print("A small mmMamba (hybrid: Mamba-2 and attention layers) looks at a picture it was never trained on.\n")
    print_image(enlarged, path)
    chat.start([image])
    for question, truth in turns[:3]:
        print(f"> {question}", flush=True)
        chat.ask(question, remember=False)
        print(f"  (right: {truth})\n")
    clip = path.with_name("clip.mp4")
    try:
        write_clip(clip)
    except ValueError as error:  # PyAV is not installed
        print(f"{error}\n")
        return
    print(f"Beside it lies a short video: type `/video {clip}` here, or run")
    program = sys.argv[0] if Path(sys.argv[0]).name == "mmmamba" else "mmmamba"  # with its path if it has one
    print(f'{shlex.quote(program)} chat --video {clip} "Where is the red star?"\n')


def read_questions(chat: Chat, new_image_restarts: bool = True) -> None:
    """Answers what the user types until they stop; prints nothing if the input is not a terminal.

    Args:
        chat: The conversation to continue.
        new_image_restarts: Whether `/image FILE` and `/video FILE` start a new conversation or add to this one.
    """
    if not sys.stdin.isatty():
        return
    effect = "starts again with another picture or video" if new_image_restarts else "adds a picture or video"
    print(f"Your turn. An empty line or Ctrl-D ends the chat; /image FILE or /video FILE {effect}.")
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
                image = read_image(path)
                print_image(image, path)
                (chat.start if new_image_restarts else chat.add_images)([image])
            elif line.startswith("/video "):
                path = path_or_address(line.removeprefix("/video ").strip())
                check_video(path)
                if new_image_restarts:
                    chat.start()
                chat.read_video(path)
            else:
                chat.ask(line)
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(interrupted; question and answer are not part of the conversation)")


def print_image(image: Image.Image, path: Path) -> None:
    """Prints an image's path and size and, on a terminal, a small version of it: two pixels in each character."""
    print(f"{path} ({image.width} x {image.height} pixels)")
    if not sys.stdout.isatty():
        return
    width = min(image.width, shutil.get_terminal_size().columns - 2, 72)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    pixels = image.resize((width, height)).load()
    for y in range(0, height, 2):
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pixels[x, y], *pixels[x, y + 1]) for x in range(width))
        print("".join(cells) + "\x1b[0m")
    print()
