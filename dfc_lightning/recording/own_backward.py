"""Noticing calls of ``torch.autograd.Function``: torch's function modes do not see them.

``apply`` is torch's own, in C, and may have been taken from its class long ago; but whenever it runs it asks the class
for its ``forward`` and ``setup_context``. The metaclass of all such classes hands out, as long as anybody listens,
versions of these that tell of the call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

from torch.autograd.function import Function, FunctionMeta


class FunctionCall(NamedTuple):
    """A call of an autograd function, as its forward has ended.

    Args:
        function: the class.
        node: what its results will have for their ``grad_fn``, if they have one.
        args: what it was called with.
        result: what its forward has returned.
    """

    function: type[Function]
    node: Any
    args: Sequence[Any]
    result: Any


Listener = Callable[[FunctionCall], None]

_listeners: dict[int, list[Listener]] = {}
"""By thread: what another thread runs is no part of a pass."""
_changing = threading.Lock()


@contextlib.contextmanager
def function_calls(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of each call of an autograd function that this thread makes inside."""
    thread = threading.get_ident()
    with _changing:
        if not _listeners:
            FunctionMeta.__getattribute__ = _told  # type: ignore[method-assign,assignment]
        _listeners.setdefault(thread, []).append(listener)
    try:
        yield
    finally:
        with _changing:
            _listeners[thread].remove(listener)
            if not _listeners[thread]:
                del _listeners[thread]
            if not _listeners:
                del FunctionMeta.__getattribute__  # type: ignore[misc]


def _told(cls: Any, name: str) -> Any:
    found = type.__getattribute__(cls, name)
    if name not in ("forward", "setup_context") or threading.get_ident() not in _listeners:
        return found
    apart = type.__getattribute__(cls, "setup_context") is not _INHERITED
    if apart and name == "setup_context":

        @wraps(found)
        def set_up(node: Any, inputs: Sequence[Any], output: Any) -> None:
            found(node, inputs, output)
            _tell(FunctionCall(cls, node, inputs, output))

        return set_up
    if not apart and name == "forward":

        @wraps(found)
        def forward(node: Any, *args: Any) -> Any:
            result = found(node, *args)
            _tell(FunctionCall(cls, node, args, result))
            return result

        return forward
    return found


_INHERITED = Function.setup_context
"""That of a class whose forward is given the context."""


def _tell(call: FunctionCall) -> None:
    for listener in list(_listeners.get(threading.get_ident(), ())):
        listener(call)
