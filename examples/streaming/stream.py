"""A model that watches: frames come one by one, and questions are answered on a copy of its state."""

from pathlib import Path

import numpy as np

from mmmamba.conversation_mmmamba import ConversationState

from .scenes import FRAME


class Stream:
    """A conversation whose first turn never ends: every frame is added to it.

    A question is answered by a fork, which is thrown away: a copy of a state of fixed size costs nothing, and the
    stream goes on as if nobody had asked. Answers in the stream would make up more and more of what a small state
    remembers, mistakes included.

    Args:
        model: An `MmMambaForConditionalGeneration`.
        tokenizer: The package's.
        processor: An `MmMambaVideoProcessor`, which cuts a frame into tiles.
        frame_text: What stands for a frame, with `<image>`; `{number}` in it is the frame's number from 1.
        restart: Frames after which it forgets everything, `file` too, and begins again; never if not given.
        file: A saved conversation to begin with, if it exists.

    Attributes:
        state: The conversation.
        frames: Frames that were read.
        tokens: Tokens that were read.

    Raises:
        ValueError: if `frame_text` has not one `<image>`, or the file is no conversation with this model.
    """

    def __init__(
        self,
        model,
        tokenizer,
        processor,
        frame_text: str = FRAME,
        restart: int | None = None,
        file: Path | None = None,
    ):
        if frame_text.count(FRAME) != 1:
            raise ValueError(f"frame_text={frame_text!r:.60} does not say {FRAME} once; the frame stands there.")
        self.tokenizer, self.processor = tokenizer, processor
        self.frame_text, self.restart = frame_text, restart
        if file is not None and file.exists():
            self.state = ConversationState.load(file, model, tokenizer)
        else:
            self.state = model.conversation(tokenizer)
        self._empty = model.conversation(tokenizer)
        self._grows = bool(self.state.cache.attention_layers)
        self.frames = self.tokens = self._since_restart = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state: of Mamba-2 layers, and keys and values if layers attend."""
        return self.state.nbytes

    def read(self, *frames: np.ndarray) -> None:
        """Reads the next frame, or several at once, which costs little more than one.

        Args:
            frames: (height, width, 3) each, uint8.
        """
        if self.restart and self._since_restart + len(frames) > self.restart and self._since_restart:
            self.state, self._since_restart = self._empty.fork(), 0
        numbers = range(self.frames + 1, self.frames + len(frames) + 1)
        text = "".join(self.frame_text.replace("{number}", str(number)) for number in numbers)
        before, inputs = len(self.state), self.processor(list(frames), return_tensors="pt")
        self.state.extend(text, inputs["pixel_values"], inputs["num_patches"].tolist())
        self.frames += len(frames)
        self._since_restart += len(frames)
        self.tokens += len(self.state) - before
        if not self._grows:
            self.state.forget_ids()

    def ask(self, question: str, generation_config: dict, streamer=None) -> str:
        """Answers a question about what was seen; see `ConversationState.ask`."""
        if not self.frame_text.endswith("\n"):
            question = "\n" + question  # pictures stand on a line of their own
        return self.state.fork().ask(question, generation_config, streamer=streamer)
