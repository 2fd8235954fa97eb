"""What goes wrong, in words for an engine's log."""

from __future__ import annotations

import os


class OciError(Exception):
    """The request cannot be carried out; the text is for the engine's log. Some engines look for phrases in it."""


def strerror(error: OSError) -> str:
    """The kernel's words in the case engines look for them: ``no such file or directory``."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]
