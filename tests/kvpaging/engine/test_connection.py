from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.ids import RequestId
from kvpaging.engine.connection import (
    LENGTH,
    MAX_UNSENT_BYTES,
    Connection,
    ConnectionClosed,
    FrameSplitter,
    ProtocolError,
    encode_frame,
)
from kvpaging.engine.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    GetPages,
    Hello,
    Loading,
    Shutdown,
    ToEngine,
)
from kvpaging.scheduling.events import Abort, Arrival, Finish
from kvpaging.scheduling.request import Request, SamplingParams

HELLO = Hello(PROTOCOL_VERSION)
DECODER = msgspec.msgpack.Decoder(ToEngine)

messages_to_engine = st.lists(
    st.one_of(
        st.builds(Abort, st.text(max_size=4)),
        st.builds(Finish, st.text(max_size=4), st.integers(0, 9), st.integers(0, 99)),
        st.builds(GetPages, st.integers(0, 2**31)),
        st.builds(
            lambda ids, bias: Arrival(
                Request(RequestId("r"), tuple(ids), SamplingParams(1, 2**63, logit_bias=bias))
            ),
            st.lists(st.integers(0, 2**31), max_size=5),
            st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 9)), max_size=2).map(tuple),
        ),
        st.just(Shutdown()),
    ),
    max_size=6,
)


@given(messages_to_engine, st.data())
def test_messages_survive_any_cut_of_the_stream(
    messages: list[msgspec.Struct], data: st.DataObject
) -> None:
    sent = [HELLO, *messages]
    stream = b"".join(map(encode_frame, sent))
    splitter = FrameSplitter(DECODER)
    received: list[object] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += splitter.feed(stream[:size])
        stream = stream[size:]
    assert received == sent


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_waited_for_but_never_a_message(garbage: bytes) -> None:
    splitter = FrameSplitter(DECODER)
    with contextlib.suppress(ProtocolError):
        assert splitter.feed(garbage) == []


def test_a_frame_over_the_limit_is_refused_before_it_arrives() -> None:
    splitter = FrameSplitter(DECODER)
    with pytest.raises(ProtocolError, match=f"{MAX_FRAME_BYTES + 1} bytes"):
        splitter.feed(LENGTH.pack(MAX_FRAME_BYTES + 1))


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="Loading"):
        encode_frame(Loading("x" * MAX_FRAME_BYTES))


def test_the_first_message_must_be_hello_of_our_version() -> None:
    with pytest.raises(ProtocolError, match="Shutdown and not Hello"):
        FrameSplitter(DECODER).feed(encode_frame(Shutdown()))
    with pytest.raises(ProtocolError, match="different versions"):
        FrameSplitter(DECODER).feed(encode_frame(Hello(PROTOCOL_VERSION + 1)))


def test_a_message_of_the_other_direction_is_refused() -> None:
    splitter = FrameSplitter(DECODER)
    splitter.feed(encode_frame(HELLO))
    with pytest.raises(ProtocolError, match="can't be read"):
        splitter.feed(encode_frame(Loading("backwards")))


@pytest.fixture
def ends() -> Iterator[tuple[Connection[ToEngine], socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, DECODER)
    with theirs:
        yield connection, theirs
    connection.close()


def test_sending_never_waits_and_what_is_unsent_goes_out_later(
    ends: tuple[Connection[ToEngine], socket.socket],
) -> None:
    connection, other = ends
    message = Loading("x" * 1024 * 1024)
    num_sent = 0
    while not connection.is_congested:
        connection.send(message)  # nobody reads
        num_sent += 1
    assert num_sent * len(encode_frame(message)) > MAX_UNSENT_BYTES
    expected = num_sent * len(encode_frame(message))
    num_received = 0
    other.setblocking(False)
    while num_received < expected:
        connection.receive(0)
        try:
            num_received += len(other.recv(1 << 20))
        except BlockingIOError:
            continue
    assert num_received == expected
    assert not connection.is_congested


def test_receive_waits_no_longer_than_told(
    ends: tuple[Connection[ToEngine], socket.socket],
) -> None:
    connection, other = ends
    assert connection.receive(0.01) == []
    other.sendall(encode_frame(HELLO) + encode_frame(GetPages(7)))
    assert connection.receive(None) == [HELLO, GetPages(7)]


def test_the_end_of_the_other_side_is_noticed(
    ends: tuple[Connection[ToEngine], socket.socket],
) -> None:
    connection, other = ends
    other.close()
    with pytest.raises(ConnectionClosed):
        connection.receive(None)
    with pytest.raises(ConnectionClosed):
        connection.send(HELLO)


def test_close_lingers_for_the_last_messages() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, DECODER)
    connection.send(HELLO)
    connection.close(linger_s=1)
    with theirs:
        assert theirs.recv(1 << 16) == encode_frame(HELLO)
        assert theirs.recv(1) == b""
