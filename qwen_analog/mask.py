"""Moved to `qwen_analog.attention`: the old names work in this version, and warn."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    from ._renamed import moved

    __getattr__ = moved(__name__)
