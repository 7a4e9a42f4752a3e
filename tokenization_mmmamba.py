"""The SentencePiece tokenizer of InternLM2, with the tokens that mark turns and pictures.

Special tokens are split off first; every piece of text between them is encoded on its own and so gets SentencePiece's
dummy prefix again. Checked against upstream's tokenizer on the fixture `tokenizer`.
"""

import re
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"]
PICTURE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]

# A character that Unicode reserves for inside use: put into a control token, it keeps the token from being recognised,
# and it is dropped before text is encoded.
PLAIN_TEXT_MARK = "\ufdd0"

# InternLM2's SentencePiece model has these as whole pieces, some with ids of control tokens. A mark inside asks for
# the text instead.
RESERVED_PIECE = re.compile(r"\[UNUSED_TOKEN_\d+\]")


class MmMambaTokenizer(SentencePieceBackend):
    """Text to ids and back.

    Args:
        vocab_file: Path of a SentencePiece BPE model, `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: Pieces of that model.
        add_bos_token: Whether a text starts with `bos_token`.
        add_eos_token: Whether a text ends with `eos_token`.
        extra_special_tokens: Tokens after those of the model, in the order of their ids; those of turns and pictures
            if not given.

    Raises:
        ValueError: if `vocab_file` is missing or damaged.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        extra_special_tokens: list[str] | None = None,
        **kwargs,
    ):
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(f"vocab_file={vocab_file!r} is no file; put the SentencePiece `tokenizer.model` there.")
        if extra_special_tokens is None:
            extra_special_tokens = CONTROL_TOKENS + PICTURE_TOKENS
        kwargs.setdefault("clean_up_tokenization_spaces", True)  # as upstream's decode does: "one ." becomes "one."
        try:
            super().__init__(
                vocab_file=vocab_file,
                unk_token=unk_token,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                add_bos_token=add_bos_token,
                add_eos_token=add_eos_token,
                extra_special_tokens=extra_special_tokens,
                **kwargs,
            )
        except RuntimeError as error:  # SentencePiece's own
            raise ValueError(f"{vocab_file} is no SentencePiece model ({error}); give an undamaged one.") from None
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        unmarked = text.replace(PLAIN_TEXT_MARK, "")
        pieces = super()._tokenize(unmarked, **kwargs)
        if unmarked == text:
            return pieces
        *starts, _ = accumulate(len(part) for part in text.split(PLAIN_TEXT_MARK))  # where marks were
        names = [match for match in RESERVED_PIECE.finditer(unmarked) if self._has_piece(match[0])]
        as_text = iter([any(name.start() < start < name.end() for start in starts) for name in names])
        spelled = []
        for piece in pieces:
            is_text = RESERVED_PIECE.fullmatch(piece) and next(as_text)
            spelled += [part for letter in piece for part in self._letter(letter)] if is_text else [piece]
        return spelled

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether text before a space and the space with what follows are encoded apart: no piece has both."""
        pieces = map(self.sp_model.id_to_piece, range(self.sp_model.get_piece_size()))
        return not any("▁" in piece.lstrip("▁") for piece in pieces)

    def _has_piece(self, piece: str) -> bool:
        return self.sp_model.piece_to_id(piece) != self.sp_model.unk_id()

    def _letter(self, letter: str) -> list[str]:
        return [letter] if self._has_piece(letter) else [f"<0x{byte:02X}>" for byte in letter.encode()]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """Adds beginning and end tokens as `add_bos_token` and `add_eos_token` say."""
        ids = ([self.bos_token_id] if self.add_bos_token else []) + token_ids_0 + (token_ids_1 or [])
        return ids + ([self.eos_token_id] if self.add_eos_token else [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces, bytes included, to text; the dummy prefix is dropped."""
        return self.sp_model.decode(tokens)

    def save_chat_templates(self, save_directory, tokenizer_config: dict, *args, **kwargs):
        """As in Transformers; also keeps the two options that it leaves out of tokenizer_config.json."""
        tokenizer_config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        return super().save_chat_templates(save_directory, tokenizer_config, *args, **kwargs)


MmMambaTokenizer.register_for_auto_class()

__all__ = ["MmMambaTokenizer"]
