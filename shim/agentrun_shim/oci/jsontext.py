"""JSON with the interpreter's own scanner, without the ``json`` package, whose import takes longer than a container's set-up."""

from __future__ import annotations

from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Context:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}  # noqa: RUF012 -- the scanner's own

    @staticmethod
    def parse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")


def loads(data: bytes, what: str) -> Any:
    """Decode one document; ``what`` is what the error calls it.

    Raises:
        OciError: it is no JSON.
    """
    try:
        text = data.decode()
        try:
            from _json import make_scanner

            context: Any = _Context
            value, end = make_scanner(context)(text, _blank(text, 0))
            if _blank(text, end) != len(text):
                raise ValueError(f"more than one value, at {end}")
        except (ImportError, TypeError, AttributeError, SystemError):
            # Another interpreter, or a newer one; or no word for what is wrong: the scanner wants json's own error.
            import json

            value = json.loads(text)
    except StopIteration as stop:
        raise OciError(f"{what}: no value at character {stop.value}") from None
    except (ValueError, RecursionError) as error:
        raise OciError(f"{what}: {error}") from None
    return value


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def dumps(value: Any) -> str:
    """Encode in one line."""
    if isinstance(value, str):
        return _quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{_quoted(str(key))}:{dumps(item)}" for key, item in value.items()]) + "}"
    return "[" + ",".join([dumps(item) for item in value]) + "]"


def _quoted(text: str) -> str:
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        import json

        return json.dumps(text)
    return encode_basestring_ascii(text)
