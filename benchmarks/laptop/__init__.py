"""`mmmamba bench laptop`: what a person without a GPU gets, beside llama.cpp. `comparison` runs it."""

from .comparison import run


__all__ = ["run"]
