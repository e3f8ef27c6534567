"""The inbox: calls from other threads to the loop."""

from __future__ import annotations

import socket
import threading
from contextvars import ContextVar

import anyio
import pytest

from async_ckpt import ServiceClosedError
from async_ckpt.engine.inbox import Inbox
from async_ckpt.handle import Outcome, await_outcome

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The loop is asyncio's."""
    return "asyncio"


async def test_calls_are_made_in_order_also_those_sent_before_the_loop_began() -> None:
    """Each call is made once, on the loop thread, in the order in which it was sent."""
    inbox, seen = Inbox(), list[tuple[int, int]]()
    done: Outcome[None] = Outcome()

    def send(numbers: range) -> None:
        for number in numbers:
            inbox.send(lambda number=number: seen.append((number, threading.get_ident())))

    send(range(100))
    with inbox.open(*socket.socketpair()):
        sender = threading.Thread(
            target=lambda: (send(range(100, 200)), inbox.send(lambda: done.set_result(None)))
        )
        sender.start()
        await await_outcome(done)
        sender.join()
    assert seen == [(number, threading.get_ident()) for number in range(200)]


async def test_more_calls_than_the_socket_has_room_for() -> None:
    """The loop may be busy for as long as it likes: what is sent meanwhile neither waits nor is lost."""
    inbox, seen = Inbox(), list[int]()
    with inbox.open(*socket.socketpair()):
        for number in range(50_000):  # the loop cannot read before this has ended
            inbox.send(lambda number=number: seen.append(number))
        await anyio.wait_all_tasks_blocked()
        while len(seen) < 50_000:
            await anyio.lowlevel.checkpoint()
    assert seen == list(range(50_000))


async def test_a_call_does_not_run_in_the_context_of_its_sender() -> None:
    """Tasks that a call starts inherit nothing from the thread that sent it."""
    variable: ContextVar[str] = ContextVar("variable", default="the loop's")
    inbox, seen = Inbox(), Outcome[str]()

    def send() -> None:
        variable.set("the sender's")
        inbox.send(lambda: seen.set_result(variable.get()))

    with inbox.open(*socket.socketpair()):
        sender = threading.Thread(target=send)
        sender.start()
        await await_outcome(seen)
        sender.join()
    assert seen.result() == "the loop's"


async def test_refused_once_the_loop_has_ended() -> None:
    """What was sent before the end is made; later calls are refused, and not made."""
    inbox, seen = Inbox(), list[str]()
    with inbox.open(*socket.socketpair()):
        inbox.send(lambda: seen.append("before"))
    with pytest.raises(ServiceClosedError):
        inbox.send(lambda: seen.append("after"))
    assert seen == ["before"]
