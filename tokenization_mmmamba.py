"""The SentencePiece tokenizer of InternLM2, with special tokens for turns and pictures.

Special tokens are split off first; each text between them is encoded by itself, so SentencePiece puts its dummy prefix
before it. Checked against upstream's tokenizer on the fixture `tokenizer`.
"""

import re
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"]
PICTURE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]

# A Unicode noncharacter. Inside a control token it keeps the token from being recognised; it is removed before text is
# encoded.
PLAIN_TEXT_MARK = "\ufdd0"

# InternLM2's SentencePiece model has these as pieces, some with the ids of control tokens. With a mark inside, they
# are spelled out in characters instead.
RESERVED_PIECE = re.compile(r"\[UNUSED_TOKEN_\d+\]")


class MmMambaTokenizer(SentencePieceBackend):
    """Text to ids and back.

    Args:
        vocab_file: Path of a SentencePiece BPE model, `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: Pieces of the model.
        add_bos_token: Whether a text starts with `bos_token`.
        add_eos_token: Whether a text ends with `eos_token`.
        extra_special_tokens: Tokens appended to the model's vocabulary, in this order; `CONTROL_TOKENS` and
            `PICTURE_TOKENS` if not given.

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
        kwargs.setdefault("clean_up_tokenization_spaces", True)  # as upstream: decodes "one ." to "one."
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
        *marks, _ = accumulate(len(part) for part in text.split(PLAIN_TEXT_MARK))  # their offsets in `unmarked`
        reserved = [match for match in RESERVED_PIECE.finditer(unmarked) if self._has_piece(match[0])]
        is_marked = iter([any(match.start() < mark < match.end() for mark in marks) for match in reserved])
        tokens = []
        for piece in pieces:
            if RESERVED_PIECE.fullmatch(piece) and next(is_marked):
                tokens += [token for character in piece for token in self._spell(character)]
            else:
                tokens.append(piece)
        return tokens

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text can be cut before any space and its parts encoded apart: no piece has a space inside."""
        pieces = map(self.sp_model.id_to_piece, range(self.sp_model.get_piece_size()))
        return not any("▁" in piece.lstrip("▁") for piece in pieces)

    def _has_piece(self, piece: str) -> bool:
        return self.sp_model.piece_to_id(piece) != self.sp_model.unk_id()

    def _spell(self, character: str) -> list[str]:
        return [character] if self._has_piece(character) else [f"<0x{byte:02X}>" for byte in character.encode()]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """Adds beginning and end tokens as `add_bos_token` and `add_eos_token` say."""
        ids = ([self.bos_token_id] if self.add_bos_token else []) + token_ids_0 + (token_ids_1 or [])
        return ids + ([self.eos_token_id] if self.add_eos_token else [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces, bytes included, to text; the dummy prefix is dropped."""
        return self.sp_model.decode(tokens)

    def save_chat_templates(self, save_directory, tokenizer_config: dict, *args, **kwargs):
        """As in Transformers; also adds the two options that it leaves out of tokenizer_config.json."""
        tokenizer_config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        return super().save_chat_templates(save_directory, tokenizer_config, *args, **kwargs)


MmMambaTokenizer.register_for_auto_class()

__all__ = ["MmMambaTokenizer"]
