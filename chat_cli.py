"""The former place of `mmmamba.cli.chat`, kept for scripts that import from it."""

from mmmamba.cli.chat import read_image as open_picture


__all__ = ["open_picture"]
