"""Running a module so that it does not know of it: all that it holds is afterwards as it was."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size)
_OTHERS = ("lightning", "pytorch_lightning", "lightning_fabric", "torch", "threading", "logging", "multiprocessing")
"""Packages whose objects, but for modules and tensors, are no state of the module: trainers, optimizers, datasets."""
_running: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def unseen(module: nn.Module, *more: Any) -> Iterator[None]:
    """Undo what becomes of a module inside: parameters, buffers, and attributes, of all modules in it.

    Attributes are followed into collections and objects of the user's own classes, generators of random numbers are
    set back, and what is drawn from an iterator is drawn again. What is outside the module, such as globals and what
    functions close over, is not undone.

    Args:
        module: the module.
        more: other objects to be kept as they are.
    """
    if module in _running:
        yield
        return
    held = _Held()
    for value in (module, *module.parameters(), *module.buffers(), *more):  # those of scripted modules are in no dict
        held.keep(value)
    _running.add(module)
    try:
        yield
    finally:
        _running.discard(module)
        held.put_back()


class _Held:
    """Values as they were, and how to make them so again."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}  # holds the values too, so that ids stay theirs
        self._stand_ins: dict[int, _Replayed] = {}
        self._undo: list[tuple[str, Callable[[], object]]] = []

    def keep(self, value: Any, name: str = "") -> None:
        if type(value) in weakref.ProxyTypes or isinstance(value, _ATOMS) or id(value) in self._known:
            return  # a proxy is for what another owns: the trainer
        self._known[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value, name)
        elif isinstance(value, np.ndarray):
            copy = value.copy()
            self._undo.append((name, lambda: np.copyto(value, copy)))
        elif isinstance(value, MutableMapping):
            self._mapping(value, name)
        elif isinstance(value, (MutableSequence, deque)):
            self._sequence(value, name)
        elif isinstance(value, MutableSet):
            members = set(value)
            self._undo.append((name, lambda: value.__ior__(members)))
            self._undo.append((name, value.clear))  # before it: what is noted last is undone first
        elif isinstance(value, (tuple, frozenset)):
            for k, item in enumerate(value):
                self.keep(item, f"{name}[{k}]")
        elif isinstance(value, io.IOBase):
            self._file(value, name)
        else:
            self._object(value, name)

    def put_back(self) -> None:
        lost = []
        for name, undo in reversed(self._undo):
            try:
                with torch.no_grad():
                    undo()
            except Exception as error:
                lost.append(f"{name.removeprefix('.') or 'a value'} ({error})")
        if lost:
            warnings.warn(
                f"A feedback pass has changed what could not be put back: {'; '.join(lost)}. Change it in a hook such "
                "as on_train_batch_end, which feedback passes do not call, instead of in training_step or forward.",
                stacklevel=3,
            )

    def _tensor(self, tensor: Tensor, name: str) -> None:
        if is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
            return
        copy, wants = tensor.detach().clone(), tensor.requires_grad

        def undo() -> None:
            data = tensor.data  # past autograd's count of versions: to it nothing has happened
            if (data.shape, data.dtype, data.device) != (copy.shape, copy.dtype, copy.device):
                tensor.data = copy
            elif 0 not in data.stride() or not torch.equal(data, copy):
                data.copy_(copy)
            if tensor.requires_grad != wants:
                tensor.requires_grad_(wants)

        self._undo.append((name, undo))

    def _mapping(self, mapping: MutableMapping, name: str) -> None:
        before = dict(mapping)

        def undo() -> None:
            if list(mapping) != list(before) or any(mapping[k] is not v for k, v in before.items()):
                mapping.clear()
                mapping.update(before)

        self._undo.append((name, undo))
        for key, item in before.items():
            place = f"{name}.{key}" if isinstance(key, str) else f"{name}[{key!r}]"
            if _draws(item):
                mapping[key] = self._replayed(item, place, partial(before.__setitem__, key))
            else:
                self.keep(item, place)

    def _sequence(self, sequence: Any, name: str) -> None:
        before = list(sequence)

        def undo() -> None:
            if len(sequence) != len(before) or any(a is not b for a, b in zip(sequence, before)):
                sequence.clear()
                sequence.extend(before)

        self._undo.append((name, undo))
        for k, item in enumerate(before):
            if _draws(item):
                sequence[k] = self._replayed(item, f"{name}[{k}]", partial(before.__setitem__, k))
            else:
                self.keep(item, f"{name}[{k}]")

    def _replayed(self, iterator: Any, name: str, put: Callable[[Any], None]) -> Any:
        """A stand-in for an iterator, and by ``put`` one that gives again what was drawn from it."""
        stand_in = self._stand_ins.setdefault(id(iterator), _Replayed(iterator, noting=True))
        self._undo.append((name, lambda: put(stand_in.again())))
        return stand_in

    def _file(self, file: io.IOBase, name: str) -> None:
        if not file.closed and file.seekable():
            place = file.tell()
            self._undo.append((name, lambda: file.seek(place)))

    def _object(self, value: Any, name: str) -> None:
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append((name, lambda: value.set_state(state)))
        elif isinstance(value, random.Random):
            numbers = value.getstate()
            self._undo.append((name, lambda: value.setstate(numbers)))
        elif isinstance(value, (np.random.Generator, np.random.RandomState)):
            bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator  # type: ignore[attr-defined]
            words = bits.state
            self._undo.append((name, lambda: setattr(bits, "state", words)))
        elif isinstance(value, nn.Module) or not _of_others(value):
            if hasattr(value, "__dict__"):
                self._mapping(value.__dict__, name)
            slots = {s for c in type(value).__mro__ for s in _slots(c) if hasattr(value, s)}
            for slot in slots:
                item = getattr(value, slot)
                self._undo.append((f"{name}.{slot}", partial(setattr, value, slot, item)))
                self.keep(item, f"{name}.{slot}")


class _Replayed:
    """An iterator that gives again what was drawn from it, and notes what is drawn."""

    def __init__(self, iterator: Any, pending: Iterable[Any] = (), noting: bool = False) -> None:
        self._iterator, self._pending = iterator, deque(pending)
        self._drawn: deque[Any] = deque()
        self._noting = noting
        self._given: Any = None

    def __iter__(self) -> _Replayed:
        return self

    def __next__(self) -> Any:
        if self._pending:
            return self._pending.popleft()
        item = next(self._iterator)
        if self._noting:
            self._drawn.append(item)
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def again(self) -> Any:
        """The iterator with what was drawn before it; the same one to all who held it."""
        if self._given is None:
            self._given = self._iterator
            if isinstance(self._iterator, _Replayed):
                self._iterator._pending.extendleft(reversed(self._drawn))
            elif self._drawn:
                self._given = _Replayed(self._iterator, self._drawn)
        return self._given


def _draws(value: Any) -> bool:
    """Whether a value can only be drawn from; iterators of the user's own classes have attributes to put back."""
    if type(value) in weakref.ProxyTypes or not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    return isinstance(value, _Replayed) or not hasattr(value, "__dict__") or _of_others(value)


def _of_others(value: Any) -> bool:
    return isinstance(value, type(np)) or any(c.__module__.split(".")[0] in _OTHERS for c in type(value).__mro__)


def _slots(kind: type) -> tuple[str, ...]:
    found = kind.__dict__.get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__") and not n.startswith("__"))
