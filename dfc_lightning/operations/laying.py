"""Where the samples lie in the results of a call: a table of rules by the names of torch's functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.operations.arguments import named, tensors_of
from dfc_lightning.operations.layout import FIRST, SHARED, Layout
from dfc_lightning.operations.operation import Slot, filled
from dfc_lightning.operations.recognise import RECURRENT, Call

Known = dict[Slot, Layout]
Rule = Callable[[Call, Known], "list[Layout]"]
RULES: dict[str, Rule] = {}


class Mixes(Exception):
    """A call's results have no place where the samples lie; the message says why."""


def laid(call: Call, layouts: Sequence[Layout | str]) -> list[Layout | str]:
    """Where the samples lie in each result of a call; a sentence, why they lie nowhere.

    Args:
        call: the call.
        layouts: of all slots so far.
    """
    known = {s: layouts[s] for s in call.inputs if layouts[s] != SHARED}
    if not known:
        return [SHARED] * len(call.outputs)
    if len(known) < len(call.inputs):
        args, kwargs = _without_shared((call.args, call.kwargs), known, call.values)
        call = replace(call, args=args, kwargs=kwargs, inputs=list(known))
    mixed = [each for each in known.values() if isinstance(each, str)]
    if mixed:
        return [mixed[0]] * len(call.outputs)
    try:
        return list(RULES.get(call.name, _kept)(call, known))  # type: ignore[arg-type]
    except Mixes as reason:
        return [str(reason)] * len(call.outputs)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:  # a call in a form that the rule does not know
        return [f"where the samples go in it could not be told ({error})"] * len(call.outputs)


def _without_shared(tree: Any, known: Mapping[Slot, Any], values: Sequence[Tensor]) -> Any:
    """Arguments in which tensors that no samples are in stand for themselves."""
    if isinstance(tree, Slot):
        return tree if tree in known else values[tree]
    if isinstance(tree, dict):
        return {k: _without_shared(v, known, values) for k, v in tree.items()}
    return type(tree)(_without_shared(v, known, values) for v in tree) if type(tree) in (tuple, list) else tree


def rule(names: Iterable[str]) -> Callable[[Rule], Rule]:
    """Enter a rule into the table."""

    def enter(given: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, given))
        return given

    return enter


def _of(call: Call, known: Known) -> tuple[Tensor, Layout]:
    return call.x, known[call.inputs[0]]


def _kept(call: Call, known: Known) -> list[Layout]:
    """They stay where they are, counted from the first dimension or, where there are more now, from the last."""
    layouts = set(known.values())
    found = []
    for slot in call.outputs:
        y = call.values[slot]
        if len(layouts) == 1:
            x, layout = _of(call, known)
            if y.dim() <= x.dim() and y.shape[layout.dim : layout.dim + 1] == x.shape[layout.dim : layout.dim + 1]:
                found.append(layout)
                continue
        found.append(_broadcast(call, known, y))
    return found


def _broadcast(call: Call, known: Known, y: Tensor) -> Layout:
    places = {(call.values[s].dim() - each.dim, *each[1:], call.values[s].shape[each.dim]) for s, each in known.items()}
    if len(places) > 1:
        raise Mixes("its arguments have the samples in different dimensions")
    ((back, before, rows, size),) = places
    if y.dim() < back or y.shape[-back] != size:
        (x, layout), shape = _of(call, known), tuple(y.shape)
        raise Mixes(f"the samples lie in dimension {layout.dim} of {tuple(x.shape)}, and nowhere in {shape}")
    return Layout(y.dim() - back, before, rows)


@rule(["embedding", "one_hot", "_with_item", "unfold", "fold", "im2col", "col2im"])
def _as_first(call: Call, known: Known) -> list[Layout]:
    return [_of(call, known)[1]] * len(call.outputs)


_REDUCING = ["mean", "sum", "nansum", "nanmean", "amax", "amin", "max", "min", "prod", "norm", "vector_norm", "var"]
_REDUCING += ["std", "var_mean", "std_mean", "logsumexp", "median", "argmax", "argmin", "any", "all"]


_BY_PLACE = {"max", "min", "median", "any", "all", "prod", "argmax", "argmin"}


@rule(_REDUCING)
def _reduced(call: Call, known: Known) -> list[Layout]:
    if len(call.inputs) > 1 or call.y.dim() == call.x.dim() > 0 and call.y.shape == call.x.shape:
        return _kept(call, known)
    given = named(call.function, call.args, call.kwargs)
    x, layout = _of(call, known)
    dims = given.get("dim", given.get("axis"))
    if dims is None and call.name in _BY_PLACE and len(call.args) > 1:  # torch names no more than their first argument
        dims = call.args[1]
    over = range(x.dim()) if dims is None or dims == () else dims if isinstance(dims, (tuple, list)) else (dims,)
    axes = {axis % max(x.dim(), 1) for axis in over}
    if layout.dim in axes:
        raise Mixes(f"it reduces dimension {layout.dim}, in which the samples lie")
    kept = call.y.dim() == x.dim()
    return [layout._replace(dim=layout.dim - (0 if kept else sum(a < layout.dim for a in axes)))] * len(call.outputs)


_VIEWS = ["permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "squeeze", "unsqueeze", "select"]
_VIEWS += ["narrow", "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "expand", "expand_as", "adjoint"]
_VIEWS += ["broadcast_to", "diagonal", "__get__"]


@rule(_VIEWS)
def _viewed(call: Call, known: Known) -> list[Layout]:
    """By a look at where the dimension goes whose stride is 1, all others having none."""
    x, layout = _of(call, known)
    size = x.shape[layout.dim]
    strides = [int(dim == layout.dim) for dim in range(x.dim())]
    found = []
    for y in _run(call, torch.empty(max(size, 1)).as_strided(x.shape, strides)):
        whole = (size, size // layout.before)
        dims = [d for d, (n, step) in enumerate(zip(y.shape, y.stride())) if step == 1 and n in whole]
        if not dims:
            raise Mixes(f"it takes dimension {layout.dim} of {tuple(x.shape)}, in which the samples lie, apart")
        run, start = y.shape[dims[-1]], y.storage_offset()
        if run == size and start == 0:
            found.append(layout._replace(dim=dims[-1]))
        elif layout.before > 1 and run * layout.before == size and start % run == 0:
            found.append(Layout(dims[-1], 1, layout.rows))
        else:
            raise Mixes(f"it takes dimension {layout.dim} of {tuple(x.shape)}, in which the samples lie, apart")
    return found


@rule(["__getitem__", "index_select", "repeat", "tile"])
def _picked(call: Call, known: Known) -> list[Layout]:
    if not isinstance(call.args[0], Slot) and isinstance(call.args[1], Slot) and len(call.inputs) == 1:
        return [_of(call, known)[1]]  # rows of a table that no sample has made, as many as there are indices
    if call.name == "__getitem__" and not tensors_of(call.args[1:]) and not _has_list(call.args[1]):
        return _viewed(call, known) if len(call.inputs) == 1 else _kept(call, known)
    x, layout = _of(call, known)
    place = torch.arange(x.shape[layout.dim], device=x.device)
    (y,) = _run(call, place.view(-1, *[1] * (x.dim() - layout.dim - 1)).expand(x.shape))
    for dim, size in enumerate(y.shape):
        if size == len(place) and bool((y == place.view(-1, *[1] * (y.dim() - dim - 1))).all()):
            return [layout._replace(dim=dim)]
    raise Mixes(f"it picks from dimension {layout.dim} of {tuple(x.shape)}, in which the samples lie")


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(map(_has_list, index)))


def _run(call: Call, probe: Tensor) -> list[Tensor]:
    """The call with another tensor for its first."""

    def value(slot: Slot) -> Tensor:
        return probe if slot == call.inputs[0] else call.values[slot]

    args, kwargs = filled((call.args, call.kwargs), value, probe.dtype)
    return tensors_of(call.function(*args, **kwargs))


@rule(["view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"])
def _reshaped(call: Call, known: Known) -> list[Layout]:
    (x, layout), y = _of(call, known), call.y
    if layout == FIRST and y.dim() and y.shape[0] == x.shape[0]:
        return [FIRST]
    batch = x.shape[layout.dim] // (layout.before * layout.rows)
    ahead = math.prod(x.shape[: layout.dim]) * layout.before  # entries from one sample's first to the next one's
    behind = layout.rows * math.prod(x.shape[layout.dim + 1 :])
    fits = []
    for dim, size in enumerate(y.shape):
        left, right = math.prod(y.shape[:dim]), math.prod(y.shape[dim + 1 :])
        if left and right and ahead % left == 0 and behind % right == 0:
            fit = Layout(dim, ahead // left, behind // right)
            if fit.before * batch * fit.rows == size:
                fits.append(fit)
    if not fits:
        raise Mixes(f"the shape {tuple(y.shape)} cuts samples of {tuple(x.shape)} apart, or joins parts of several")
    return [min(fits, key=lambda fit: fit.before * fit.rows)]


@rule(["cat", "concat", "concatenate"])
def _joined(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    given = named(call.function, call.args, call.kwargs)
    axis = (call.args[1] if len(call.args) > 1 else given.get("dim", given.get("axis", 0))) % x.dim()
    if set(known.values()) != {layout}:
        raise Mixes("its arguments have the samples in different dimensions")
    if axis != layout.dim:
        return [layout]
    parts = call.args[0] if call.args else given["tensors"]
    whole = all(isinstance(p, Slot) and call.values[p].shape == x.shape for p in parts) and layout.before == 1
    if not whole:
        raise Mixes(f"it puts tensors one after the other in dimension {axis}, in which the samples lie")
    return [layout._replace(before=len(parts))]


@rule(["stack"])
def _stacked(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    axis = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % (x.dim() + 1)
    if set(known.values()) != {layout}:
        raise Mixes("its arguments have the samples in different dimensions")
    return [layout._replace(dim=layout.dim + (axis <= layout.dim))]


MATRIX_PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot")


@rule(MATRIX_PRODUCTS)
def _product(call: Call, known: Known) -> list[Layout]:
    given = [*call.args, *call.kwargs.values()][:2]
    sides = given[::-1] if call.name == "__rmatmul__" else given
    tensors = [call.values[s] if isinstance(s, Slot) else s for s in sides]
    vector = [t.dim() == 1 for t in tensors]
    found = set()
    for k, side in enumerate(sides):
        if not isinstance(side, Slot):
            continue
        back = tensors[k].dim() - known[side].dim + vector[k] * (1 - k)  # as if a vector were a matrix
        if back == (1 if k == 0 else 2) or vector[k]:
            raise Mixes(f"it sums over dimension {known[side].dim} of an argument, in which the samples lie")
        lost = vector[1 - k] and (back > 1 or k == 1)
        found.add((call.y.dim() - back + lost, *known[side][1:]))
    if len(found) > 1:
        raise Mixes("its arguments have the samples in different dimensions")
    return [Layout(*next(iter(found)))]


@rule(["einsum"])
def _einsum(call: Call, known: Known) -> list[Layout]:
    equation, *given = call.args
    operands: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return _kept(call, known)
    terms, result = equation.replace(" ", "").split("->")
    letters = {
        (term[known[each].dim], *known[each][1:])
        for term, each in zip(terms.split(","), operands)
        if isinstance(each, Slot)
    }
    if len(letters) > 1:
        raise Mixes("its arguments have the samples in different dimensions")
    ((letter, before, rows),) = letters
    if letter not in result:
        raise Mixes(f"it sums over {letter!r}, in which the samples lie")
    return [Layout(result.index(letter), before, rows)]


@rule(["linear"])
def _linear(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    if layout.dim == x.dim() - 1:
        raise Mixes(f"it sums over dimension {layout.dim}, in which the samples lie")
    return _kept(call, known)


@rule(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))
def _convolved(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    if layout.dim != 0:
        raise Mixes(f"it takes dimension {layout.dim}, in which the samples lie, for channels or space")
    return _kept(call, known)


@rule(["batch_norm"])
def _normalised(call: Call, known: Known) -> list[Layout]:
    if _of(call, known)[1].dim == 1:
        raise Mixes("it takes dimension 1, in which the samples lie, for channels")
    return _kept(call, known)


@rule(["multi_head_attention_forward"])
def _attended(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    if x.dim() != 3 or layout != Layout(1):
        raise Mixes(f"it takes dimension 1 of {tuple(x.shape)} for the samples, which lie in dimension {layout.dim}")
    return [layout, FIRST][: len(call.outputs)]


@rule(RECURRENT)
def _recurred(call: Call, known: Known) -> list[Layout]:
    x, layout = _of(call, known)
    padded = isinstance(call.args[3], bool)
    if not padded or x.dim() != 3:
        raise Mixes("samples of sequences that are packed, or come without a batch, cannot be told apart")
    if layout != Layout(0 if call.args[8] else 1):
        where = 0 if call.args[8] else 1
        raise Mixes(f"it takes dimension {where} for the samples, which lie in dimension {layout.dim}; see batch_first")
    return [layout, *[Layout(1)] * (len(call.outputs) - 1)]
