"""The process that has loaded a tokeniser once and forks encoders from itself.

The control process starts it (`python -m seesaw.jobs.encoding.server`) with one end of a socket pair as its standard
input. A `Setup` comes first; then each message asks for an encoder and carries the socket that it shall serve. An
encoder that died is replaced by another fork, within milliseconds. When the control process ends, for whatever
reason, the sockets close: the server ends its encoders, which are its process group, and itself. If the server is
killed, the kernel kills its encoders.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
from typing import Any, cast

import msgspec

from seesaw.core.process import die_with_parent
from seesaw.jobs.base import Encoder
from seesaw.jobs.encoding.wire import LENGTH, Setup, encode_items, framed


def load_encoder(setup: Setup) -> Encoder:
    """The tokeniser that `setup` names."""
    module, _, path = setup.loader.partition(":")
    target: Any = importlib.import_module(module)
    for name in path.split("."):
        target = getattr(target, name)
    return cast(Encoder, target(setup.name))


def serve(connection: socket.socket, encoder: Encoder) -> None:
    """Answer the frames of one connection until it is closed."""
    decoder, replies = msgspec.msgpack.Decoder(list[Any]), msgspec.msgpack.Encoder()
    connection.sendall(framed(b""))
    while (frame := _frame(connection)) is not None:
        connection.sendall(framed(replies.encode(encode_items(encoder, decoder.decode(frame)))))


def _frame(connection: socket.socket) -> bytes | None:
    header = _exactly(connection, LENGTH.size)
    return None if header is None else _exactly(connection, LENGTH.unpack(header)[0])


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _fork(control: socket.socket, connection: socket.socket, encoder: Encoder) -> None:
    server = os.getpid()
    if os.fork():
        return
    code = 1
    try:
        die_with_parent()
        control.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getppid() == server:  # else it died before the line above, and nobody would tell
            with contextlib.suppress(ConnectionError):
                serve(connection, encoder)
        code = 0
    finally:
        os._exit(code)


def _serve_forks(control: socket.socket, encoder: Encoder) -> None:
    gc.collect()
    gc.freeze()  # the pages of what was loaded stay shared
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            _fork(control, connection, encoder)


def _end_encoders() -> None:
    """End the forked processes, all of which are in this one's group, and wait for them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the encoders
    assert os.getpgrp() == os.getpid(), "the server ends its process group, so it must have one of its own"
    # Tokenising needs no torch; without it transformers is imported in half the time and a quarter of the memory.
    sys.modules["torch"] = None  # type: ignore[assignment]
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # an encoder that held the socket too would keep it open
    with control, contextlib.suppress(ConnectionError):
        setup = _frame(control)
        if setup is not None:
            try:
                _serve_forks(control, load_encoder(msgspec.msgpack.decode(setup, type=Setup)))
            finally:
                _end_encoders()


if __name__ == "__main__":
    _main()
