"""Typed messages over a stream socket: frames in both directions, bounded, never pickle.

A frame is a 4-byte little-endian length and a msgpack body of at most `MAX_FRAME_BYTES`.
`encode_frame` and `FrameSplitter` are plain functions of bytes, so that the API can use them on its
event loop; `Connection` is the engine's end, for one thread without an event loop.
Knows nothing of engines, and of messages only the unions that it is given.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Final, Generic, TypeVar

import msgspec

from kvpaging.base.errors import KvPagingError
from kvpaging.engine.messages import MAX_FRAME_BYTES, PROTOCOL_VERSION, Hello

LENGTH: Final = struct.Struct("<I")
RECEIVE_BYTES: Final = 256 * 1024
POLLIN_OUT: Final = select.POLLIN | select.POLLOUT
MAX_UNSENT_BYTES: Final = 8 * 1024 * 1024
"""Above this the engine waits for the API to read before it computes more."""

_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


class ProtocolError(KvPagingError):
    """The other side sent what this side can't read, or speaks another version."""


class ConnectionClosed(KvPagingError):
    """The other side is gone."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """Give the message as one frame. Raises `ProtocolError` when it is over `MAX_FRAME_BYTES`."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(body)} bytes is over the limit "
            f"of {MAX_FRAME_BYTES} bytes a frame"
        )
    return LENGTH.pack(len(body)) + body


class FrameSplitter(Generic[T]):
    """Bytes as they arrive become whole messages of the union `T`."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]):
        self._decoder = decoder
        self._buffer = bytearray()
        self._met = False

    def feed(self, data: bytes) -> list[T]:
        """Append `data`; give the messages that are complete now, oldest first.

        Raises `ProtocolError` when a frame is too long or can't be read, when the first message is
        not `Hello`, and when its version is not ours. Nothing may be fed after that.
        """
        self._buffer += data
        messages: list[T] = []
        start = 0
        while (end := self._end_of_frame(start)) is not None:
            messages.append(self._decode(bytes(self._buffer[start + LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages

    def _end_of_frame(self, start: int) -> int | None:
        """Where the frame at `start` ends, `None` while it is incomplete."""
        if len(self._buffer) - start < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer, start)
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
        end: int = start + LENGTH.size + length
        return end if len(self._buffer) >= end else None

    def _decode(self, body: bytes) -> T:
        try:
            message = self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a message of {len(body)} bytes can't be read: {error}") from error
        if not self._met:
            self._greet(message)
        return message

    def _greet(self, message: T) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError(f"the first message is {type(message).__name__} and not Hello")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the API and the engine speak different versions ({PROTOCOL_VERSION} here, "
                f"{message.version} there): the package was changed while the server ran; "
                "restart the server"
            )
        self._met = True


class Connection(Generic[T]):
    """The engine's end of the socket. Owns the socket; sending never waits for the other side.

    What the socket does not take at once is kept and sent on by the next `send` or `receive`.
    `is_congested` says when that is too much, so that the engine's loop can wait.
    """

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[T]):
        sock.setblocking(False)
        self._socket = sock
        self._splitter = FrameSplitter(decoder)
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(sock)

    @property
    def is_congested(self) -> bool:
        """The other side reads too slowly: compute nothing more for it until it has read."""
        return len(self._unsent) > MAX_UNSENT_BYTES

    def send(self, message: msgspec.Struct) -> None:
        """Send without waiting. Raises `ConnectionClosed`, and `ProtocolError` when too large."""
        self._unsent += encode_frame(message)
        self._flush()

    def receive(self, timeout_s: float | None) -> list[T]:
        """Give what has arrived, waiting at most `timeout_s` for it (`None`: until it does).

        What is unsent goes out meanwhile. An empty list means that time ran out, or that only
        sending made progress. Raises `ConnectionClosed` and `ProtocolError`.
        """
        self._poll.modify(self._socket, POLLIN_OUT if self._unsent else select.POLLIN)
        ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        events = ready[0][1] if ready else 0
        if events & select.POLLOUT:
            self._flush()
        # A hang-up or an error is learned by reading.
        return self._read() if events & ~select.POLLOUT else []

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket, after at most `linger_s` for sending what is unsent."""
        try:
            if linger_s > 0 and self._unsent:
                self._socket.settimeout(linger_s)
                self._socket.sendall(self._unsent)
        except OSError:
            pass  # whoever does not read has lost it
        finally:
            self._socket.close()

    def _flush(self) -> None:
        try:
            while self._unsent:
                with memoryview(self._unsent) as view:
                    sent = self._socket.send(view)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionClosed(str(error)) from error

    def _read(self) -> list[T]:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionClosed(str(error)) from error
        if not data:
            raise ConnectionClosed("end of stream")
        return self._splitter.feed(data)
