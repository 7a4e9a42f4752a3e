"""The file of a saved conversation: one safetensors file, whose metadata describe it. Everything in it is checked."""

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cache_mmmamba import expected_shapes


FORMAT = "mmmamba-conversation-2"
REMEDY = "give a file that ConversationState.save wrote"
# What the metadata say beside `format`, and their types.
FIELDS = {
    "model": dict,
    "system_message": (str, type(None)),
    "last_token": str,
    "pending": str,
    "in_turn": bool,
    "turns": int,
}


def read_conversation(file: str | Path, device: str) -> tuple[dict, dict[str, Tensor]]:
    """What describes a saved conversation, with all `FIELDS`, and its tensors.

    Raises:
        ValueError: if the file is no saved conversation.
    """
    file = Path(file)
    if not file.exists():
        raise ValueError(f"{file} does not exist; {REMEDY}.")
    if not file.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{file} cannot be read: it is a folder, pipe or device; {REMEDY}.")
    try:
        with safe_open(file, "pt", device=device) as opened:
            text = (opened.metadata() or {}).get("mmmamba", "{}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); {REMEDY}.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); save the conversation again.") from None
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    found = described.get("format") if isinstance(described, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{file} is no conversation saved by this version (its format is {found!r:.60}, not {FORMAT!r}); {REMEDY}."
        )
    for name, kinds in FIELDS.items():
        value = described.get(name, ...)
        # True is an int to Python.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool) or not _is_unicode(value):
            shown = "missing" if value is ... else repr(value)[:60]
            raise ValueError(f"{file} is damaged: its metadata's {name} is {shown}; save the conversation again.")
    if described["turns"] < 0:
        raise ValueError(f"{file} is damaged: it has {described['turns']} turns; save the conversation again.")
    return described, tensors


def check_conversation(
    described: dict, tensors: dict[str, Tensor], model, last_tokens: Collection[str], file: str | Path
) -> None:
    """Raises ValueError unless these are the tensors that `save` writes for this model.

    Args:
        described: See `read_conversation`.
        tensors: The same.
        model: Which is to go on with it.
        last_tokens: What the read part may end with.
        file: For messages.
    """
    config = model.config.text_config
    read = len(tensors["ids"]) if "ids" in tensors and tensors["ids"].ndim else 0
    places = tensors.get("image_places") if model.config.shuffles_behind else None
    expected = {"ids": [read]} | expected_shapes(config, read, places)
    remedy = "save the conversation again"
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != expected or tensors["ids"].ndim != 1:
        raise ValueError(f"{file} does not hold the tensors of a whole conversation; {remedy}.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() == (name in ("ids", "image_places")) or tensor.is_complex():
            raise ValueError(f"{file} is damaged: its {name} are {tensor.dtype}; {remedy}.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{file} is damaged: its {name} has NaN or infinite values; {remedy}.")
    ids = tensors["ids"]
    if read and not 0 <= ids.min().item() <= ids.max().item() < config.vocab_size:
        raise ValueError(
            f"{file} is damaged: its ids are {ids.min().item()} to {ids.max().item()}, and the vocabulary has "
            f"{config.vocab_size}; {remedy}."
        )
    last = described["last_token"]
    if last not in last_tokens or bool(last) != bool(read):
        raise ValueError(f"{file} is damaged: no text that was read ends with {last!r:.60}; {remedy}.")


def _is_unicode(value) -> bool:
    """Whether a text has no lone surrogates, which cannot be encoded; true of all that is no text."""
    try:
        return not isinstance(value, str) or value.encode() is not None
    except UnicodeEncodeError:
        return False
