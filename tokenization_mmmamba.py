"""The tokenizer of InternLM2, with special tokens for turns and pictures; and those of other language models.

Of InternLM2's there are two: `MmMambaTokenizerFast` on the `tokenizers` library, which `AutoTokenizer` loads, and
`MmMambaTokenizer` on SentencePiece. Both give the same ids. Special tokens are split off first; each text between them
is encoded by
itself, so the dummy prefix stands before it. Checked against upstream's tokenizer on the fixture `tokenizer`.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from .chat_template_mmmamba import BOUNDARY_MARK, PLAIN_TEXT_MARK, RESERVED_PIECE, ChatTemplateMixin


CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"]
PICTURE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
logger = logging.get_logger(__name__)

SPACE = "▁"  # SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces in a SentencePiece model


class _TokenizerMixin(ChatTemplateMixin):
    """What both tokenizers share."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text can be cut before any space and its parts encoded apart: no piece has a space inside."""
        return not any(SPACE in piece.lstrip(SPACE) for piece in self.get_vocab())

    @cached_property
    def has_reserved_pieces(self) -> bool:
        """Whether the SentencePiece model has pieces `[UNUSED_TOKEN_n]`; control tokens may have their ids."""
        named = set(map(str, self.special_tokens_map.values()))
        renamed = (i < self.vocab_size and str(t) not in named for i, t in self.added_tokens_decoder.items())
        return any(renamed) or any(map(RESERVED_PIECE.fullmatch, self.get_vocab()))

    def _complete_config(self, folder: str, filename_prefix: str | None) -> None:
        """Adds to a saved tokenizer_config.json what Transformers leaves out and the other tokenizer needs."""
        file = Path(folder, (filename_prefix + "-" if filename_prefix else "") + "tokenizer_config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        config["added_tokens_decoder"] = {
            str(index): token.__getstate__()
            for index, token in sorted(self.added_tokens_decoder.items())
            if not RESERVED_PIECE.fullmatch(token.content)  # pieces of the SentencePiece model
        }
        if (auto_map := config.get("auto_map")) and (file.parent / file.name.replace("_config", "")).is_file():
            module = auto_map["AutoTokenizer"][0].rsplit(".", 1)[0]
            auto_map["AutoTokenizer"] = [f"{module}.MmMambaTokenizer", f"{module}.MmMambaTokenizerFast"]
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class MmMambaTokenizer(_TokenizerMixin, SentencePieceBackend):
    """Text to ids and back, on SentencePiece.

    Args:
        vocab_file: Path of a SentencePiece BPE model, `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: Pieces of the model.
        add_bos_token, add_eos_token: Whether a text starts with `bos_token` and ends with `eos_token`; as
            `tokenizer_file` says, or yes and no.
        extra_special_tokens: Tokens appended to the model's vocabulary, in this order; `CONTROL_TOKENS` and
            `PICTURE_TOKENS` if not given.
        tokenizer_file: `tokenizer.json` of the same folder, if any; only asked for those two.

    Raises:
        ValueError: if `vocab_file` is missing or damaged.
    """

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        extra_special_tokens: list[str] | None = None,
        tokenizer_file: str | None = None,
        **kwargs,
    ):
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(f"vocab_file={vocab_file!r} is no file; put the SentencePiece `tokenizer.model` there.")
        if tokenizer_file is not None:  # Transformers then withholds what tokenizer_config.json says of these
            backend = read_tokenizer_file(tokenizer_file)
            add_bos_token, add_eos_token = added_at_ends(backend, bos_token, eos_token, add_bos_token, add_eos_token)
        add_bos_token, add_eos_token = add_bos_token in (True, None), bool(add_eos_token)
        if extra_special_tokens is None:
            extra_special_tokens = CONTROL_TOKENS + PICTURE_TOKENS
        kwargs.setdefault("clean_up_tokenization_spaces", True)  # as upstream: decodes "one ." to "one."
        kwargs["backend"] = "sentencepiece"  # a folder's config may name the other one
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
        first, *parts = text.replace(PLAIN_TEXT_MARK, "").split(BOUNDARY_MARK)
        pieces = super()._tokenize(first, **kwargs) if first or not parts else self._anchor[: self._has_dummy_prefix]
        for part in parts:
            if len(part) == 1:
                pieces = [*pieces, *self._spell(part)]
            else:  # without a dummy prefix, for this is not the beginning
                pieces = [*pieces, *super()._tokenize(BOUNDARY_MARK + part)[len(self._anchor) :]]
        return pieces

    @cached_property
    def _anchor(self) -> list[str]:
        """Pieces of a character that merges with no other."""
        return self.sp_model.encode(BOUNDARY_MARK, out_type=str)

    @property
    def _has_dummy_prefix(self) -> bool:
        return self._anchor[:1] == [SPACE]

    def _spell(self, character: str) -> list[str]:
        piece = character.replace(" ", SPACE)
        is_piece = self.sp_model.piece_to_id(piece) != self.sp_model.unk_id()
        return [piece] if is_piece else [f"<0x{byte:02X}>" for byte in piece.encode()]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """Adds beginning and end tokens as `add_bos_token` and `add_eos_token` say."""
        ids = ([self.bos_token_id] if self.add_bos_token else []) + token_ids_0 + (token_ids_1 or [])
        return ids + ([self.eos_token_id] if self.add_eos_token else [])

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """One entry per id: 1 if `build_inputs_with_special_tokens` adds it (or if it is special), else 0."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        inside = [0] * (len(token_ids_0) + len(token_ids_1 or []))
        return [1] * bool(self.add_bos_token) + inside + [1] * bool(self.add_eos_token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces, bytes included, to text; the dummy prefix is dropped."""
        return self.sp_model.decode(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `tokenizer.model`, and `tokenizer.json` if the model can be converted."""
        (model,) = super().save_vocabulary(save_directory, filename_prefix)
        try:
            fast = backend_from_sentencepiece(model, self.added_tokens_decoder)
            self._check_ids(fast)
        except ValueError as error:
            logger.warning(
                f"tokenizer.json is not written ({error}); AutoTokenizer will load the SentencePiece model."
            )
            return (model,)
        beginning = [self.bos_token] if self.add_bos_token else []
        end = [self.eos_token] if self.add_eos_token else []
        fast.post_processor = processors.TemplateProcessing(
            single=[*beginning, "$A", *end],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in beginning + end],
        )
        file = model.removesuffix(".model") + ".json"
        fast.save(file)
        return model, file

    def _check_ids(self, fast: Tokenizer) -> None:
        """Raises ValueError if `fast` encodes the text of a piece otherwise."""
        size, added = self.sp_model.get_piece_size(), set(self.get_added_vocab())
        special = (self.sp_model.is_control, self.sp_model.is_unknown, self.sp_model.is_byte, self.sp_model.is_unused)
        pieces = [self.sp_model.id_to_piece(i) for i in range(size) if not any(is_kind(i) for is_kind in special)]
        texts = [piece.replace(SPACE, " ") for piece in pieces if piece not in added]
        texts = [text for text in texts if not RESERVED_PIECE.search(text)]
        encoded = fast.encode_batch(texts, add_special_tokens=False)
        for text, ids, other in zip(texts, self.sp_model.encode(texts), encoded, strict=True):
            if ids != other.ids:
                raise ValueError(f"its ids of {text!r} would be {other.ids}, not {ids}")

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        self._complete_config(save_directory, filename_prefix)
        return files


class MmMambaTokenizerFast(_TokenizerMixin, TokenizersBackend):
    """Text to ids and back, on the `tokenizers` library; knows offsets, so answers can be masked in training.

    Args:
        vocab_file: Path of a SentencePiece BPE model, `tokenizer.model`; read if there is no `tokenizer_file`, and
            saved with it.
        tokenizer_file: Path of a `tokenizer.json` that this class wrote.
        unk_token, bos_token, eos_token, pad_token: Pieces of the model.
        add_bos_token, add_eos_token: Whether a text starts with `bos_token` and ends with `eos_token`; as
            `tokenizer_file` says, or yes and no.
        extra_special_tokens: As in `MmMambaTokenizer`.

    Raises:
        ValueError: if both files are missing, or the one that is read is damaged.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    slow_tokenizer_class = MmMambaTokenizer

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        extra_special_tokens: list[str] | None = None,
        **kwargs,
    ):
        if extra_special_tokens is None:
            extra_special_tokens = CONTROL_TOKENS + PICTURE_TOKENS
        if tokenizer_file is not None and Path(tokenizer_file).is_file():
            self._tokenizer = read_tokenizer_file(tokenizer_file)
            add_bos_token, add_eos_token = added_at_ends(
                self._tokenizer, bos_token, eos_token, add_bos_token, add_eos_token
            )
        else:
            if vocab_file is None or not Path(vocab_file).is_file():
                raise ValueError(
                    f"vocab_file={vocab_file!r} is no file; put the SentencePiece `tokenizer.model` there, or a "
                    "tokenizer.json."
                )
            self._tokenizer = backend_from_sentencepiece(
                vocab_file, kwargs.get("added_tokens_decoder") or {}, extra_special_tokens
            )
        add_bos_token, add_eos_token = add_bos_token in (True, None), bool(add_eos_token)
        kwargs.setdefault("clean_up_tokenization_spaces", True)  # as upstream: decodes "one ." to "one."
        kwargs["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
        kwargs["backend"] = "tokenizers"  # a folder's config may name the other one
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *inputs, **kwargs):
        """As in Transformers; `backend="sentencepiece"` gives an `MmMambaTokenizer`."""
        use_sentencepiece = kwargs.get("backend") == "sentencepiece" or kwargs.get("use_fast") is False
        chosen = cls.slow_tokenizer_class if use_sentencepiece else super()
        return chosen.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        """The arguments of `__init__`, which reads the files itself."""
        return kwargs

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if self.can_save_slow_tokenizer:
            files = (*files, *self.save_vocabulary(str(save_directory), filename_prefix))
        self._complete_config(save_directory, filename_prefix)
        return files


class MmMambaTextTokenizer(ChatTemplateMixin, TokenizersBackend):
    """The tokenizer of any other language model, on the `tokenizers` library: same ids, same chat template.

    `tokenizer.json` and `tokenizer_config.json` say all of it; see `adapted_backend` for what differs in the former.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    has_reserved_pieces = False

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text can be cut before a space that follows none, and its parts encoded apart."""
        pre_tokenizer = self.backend_tokenizer.pre_tokenizer
        if pre_tokenizer is None:
            return not any(SPACE in piece.lstrip(SPACE) for piece in self.get_vocab())
        # Pre-tokenizers split by kinds of characters.
        kinds = ("ab", "é", "中", "12", "!?", "'s", "_", "\n")
        cut = [pre_tokenizer.pre_tokenize_str(f"{left} {right}") for left in kinds[:-1] for right in kinds]
        lengths = [len(left) for left in kinds[:-1] for _ in kinds]
        return all(
            any(start == length for _, (start, _) in pieces) for pieces, length in zip(cut, lengths, strict=True)
        )


def load_tokenizer(folder: str | Path, **kwargs) -> "MmMambaTokenizerFast | MmMambaTextTokenizer":
    """The tokenizer of a model folder: of the class that its tokenizer_config.json names."""
    config = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
    is_text = config.get("tokenizer_class") == MmMambaTextTokenizer.__name__
    return (MmMambaTextTokenizer if is_text else MmMambaTokenizerFast).from_pretrained(folder, **kwargs)


def adapted_backend(backend: Tokenizer) -> Tokenizer:
    """A copy that encodes marked control tokens as plain text (see `as_text`), and all else as before.

    The mark is removed by the normalizer, which must not happen before added tokens are looked for.
    """
    values = json.loads(backend.to_str())
    mark = {"type": "Replace", "pattern": {"String": PLAIN_TEXT_MARK}, "content": ""}
    others = [] if values["normalizer"] is None else [values["normalizer"]]
    values["normalizer"] = {"type": "Sequence", "normalizers": [mark, *others]}
    values["added_tokens"] = [token | {"normalized": False} for token in values["added_tokens"]]
    return Tokenizer.from_str(json.dumps(values))


def read_tokenizer_file(file: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises ValueError if it is damaged."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{file} is no tokenizer file ({error}); give an undamaged one, or remove it to read tokenizer.model."
        ) from None


def added_at_ends(backend: Tokenizer, bos_token, eos_token, add_bos_token, add_eos_token) -> tuple[bool, bool]:
    """Whether a text starts with `bos_token` and ends with `eos_token`: as is said, or else as `backend` does."""
    tokens = backend.encode("a").tokens
    return (
        tokens[0] == str(bos_token) if add_bos_token is None else add_bos_token,
        tokens[-1] == str(eos_token) if add_eos_token is None else add_eos_token,
    )


def backend_from_sentencepiece(
    vocab_file: str, added_tokens: dict[int, AddedToken], extra_special_tokens: Iterable[str] = ()
) -> Tokenizer:
    """A `tokenizers` tokenizer that gives the ids of a SentencePiece BPE model.

    SentencePiece joins the neighbours whose piece has the highest score; a list of merges, ordered by the scores of
    the pieces that they form, does the same. Reserved pieces (`[UNUSED_TOKEN_n]`) become added tokens; those whose id
    is a control token's are that token here, and text if they are typed.

    Args:
        vocab_file: Path of the model.
        added_tokens: Special tokens by id; an id below the model's size replaces the piece that has it.
        extra_special_tokens: More of them, which get the next ids in this order.

    Raises:
        ValueError: if the file is no SentencePiece BPE model, or an id cannot be given to its token.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("Reading tokenizer.model needs protobuf; run `pip install protobuf`.") from None
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(vocab_file).read_bytes())
    except Exception as error:  # protobuf's own
        raise ValueError(f"{vocab_file} is no SentencePiece model ({error}); give an undamaged one.") from None
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"{vocab_file} is no SentencePiece BPE model with spaces in front of words; give one.")
    names = {index: str(token) for index, token in added_tokens.items()}
    vocab = {names.get(index, piece.piece): index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (-score, index, piece[:cut], piece[cut:])
        for index, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    steps = [normalizers.Replace(PLAIN_TEXT_MARK, "")]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Split(BOUNDARY_MARK, "removed")
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    decode += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(decode)

    reserved = [p.piece for i, p in enumerate(model.pieces) if p.type == USER_DEFINED and i not in names]
    controls = [p.piece for i, p in enumerate(model.pieces) if p.type in (UNKNOWN, CONTROL) and i not in names]
    backend.add_tokens([AddedToken(token, normalized=False) for token in reserved])
    special = [*controls, *(names[index] for index in sorted(names)), *map(str, extra_special_tokens)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    for index, token in names.items():
        if backend.token_to_id(token) != index:
            raise ValueError(
                f"{token} would get the id {backend.token_to_id(token)}, not {index}; give the tokenizer.model and "
                "the tokenizer_config.json of one model."
            )
    return backend


for _tokenizer in (MmMambaTokenizer, MmMambaTokenizerFast, MmMambaTextTokenizer):
    _tokenizer.register_for_auto_class()

__all__ = ["MmMambaTextTokenizer", "MmMambaTokenizer", "MmMambaTokenizerFast", "load_tokenizer"]
