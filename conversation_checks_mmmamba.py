"""What a conversation's calls refuse before anything is read: what is no text, no history, no number of tiles."""

from collections.abc import Iterator
from contextlib import contextmanager

from .processing_mmmamba import TemplateError


def check_call(question="", history=None, system_message=None, num_patches_list=()) -> None:
    """Raises ValueError for what is no text, no list of (question, answer) pairs, or no number of tiles."""
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history={history!r:.80} is no list of (question, answer) pairs; give one, or None.")
    for pair in history or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"The history has {pair!r:.80}, which is no (question, answer) pair; give pairs.")
    texts = [("question", question), ("system_message", system_message)]
    texts += [("history", text) for pair in history or () for text in pair]
    for name, text in texts:
        if text is None and name == "system_message":
            continue
        if not isinstance(text, str):
            raise ValueError(f"{name} has {text!r:.80} of type {type(text).__name__}; give a text.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} has half a character (a lone surrogate) in {text!r:.80}; give whole ones.")
    for count in num_patches_list or ():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"num_patches_list has {count!r:.80}; give the number of tiles of each picture, 1 or more."
            )


@contextmanager
def template_errors() -> Iterator[None]:
    """Raises TemplateError for whatever a chat template, which is a program, raises inside."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TemplateError(
            f"The tokenizer's chat template cannot be rendered ({type(error).__name__}: {reason}); correct it."
        ) from None


__all__ = ["check_call", "template_errors"]
