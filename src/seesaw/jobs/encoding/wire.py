"""What the control process and its encoders say to each other: msgpack in frames over a socket pair.

A frame is its length and its payload. To an encoder goes a list of items, each the text of a prompt or a
`[messages, template]` pair; back comes one `Reply` for each frame, in order, after an empty frame that says that
the encoder is up.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec

from seesaw.core.errors import RequestError
from seesaw.jobs.base import Encoder
from seesaw.jobs.requests import encode_item
from seesaw.text import Tokenizer

LENGTH = struct.Struct("<I")
MAX_FRAME = (1 << 32) - 1


class Setup(msgspec.Struct, array_like=True, frozen=True):
    """The tokeniser to encode with: `loader` is `module:function` or `module:class.method`, called with `name`."""

    loader: str
    name: str


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    """A `RequestError`."""

    message: str
    code: str
    param: str | None

    def error(self) -> RequestError:
        """The error again."""
        return RequestError(self.message, code=self.code, param=self.param)


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """What became of the items of a frame."""

    counts: list[int]
    """Tokens of each item; -1 where it was refused."""
    tokens: bytes
    """The token ids of all items, one after the other, four bytes each in this machine's order."""
    refusals: list[Refusal]
    """In the order of the items refused."""


def framed(payload: bytes) -> bytes:
    """`payload` with its length before it."""
    return LENGTH.pack(len(payload)) + payload


def take_frames(buffer: bytearray) -> Iterator[bytes]:
    """The whole frames at the start of `buffer`, which are taken off it."""
    start = 0
    while len(buffer) - start >= LENGTH.size:
        (length,) = LENGTH.unpack_from(buffer, start)
        end = start + LENGTH.size + length
        if end > len(buffer):
            break
        yield bytes(memoryview(buffer)[start + LENGTH.size : end])
        start = end
    if start:
        del buffer[:start]


def encode_items(encoder: Encoder, items: list[Any]) -> Reply:
    """The reply to a frame."""
    counts, tokens, refusals = [], array("i"), []
    for result in _together(encoder, items) or (_one(encoder, item) for item in items):
        if isinstance(result, RequestError):
            refusals.append(Refusal(str(result), result.code, result.param))
            counts.append(-1)
        else:
            tokens.extend(result)
            counts.append(len(result))
    return Reply(counts, tokens.tobytes(), refusals)


def _together(encoder: Encoder, items: list[Any]) -> list[list[int]] | None:
    """The tokens of texts that a tokeniser takes together; None where they are to be taken one by one."""
    if len(items) < 2 or not isinstance(encoder, Tokenizer) or not all(isinstance(i, str) for i in items):
        return None
    try:
        return encoder.encode_many(items)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # one by one, it is told which it was
        return None


def _one(encoder: Encoder, item: Any) -> list[int] | RequestError:
    try:
        return encode_item(encoder, item)
    except RequestError as error:
        return error
