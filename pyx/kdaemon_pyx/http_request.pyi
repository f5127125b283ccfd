"""The request-head parser, from Python."""

from typing import Any

def parse(data: bytes, step: int | None = None, **limits_given: int) -> dict[str, Any] | None:
    """One request head as a dict ("status": 0, or the HTTP status it is refused with); None: it is not complete."""
