"""The arguments of torch's functions by name, and which tensors a call overwrites."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_testing_overrides


@lru_cache(maxsize=4096)
def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments, in order; none where nobody knows them.

    Built-in functions do not tell: torch keeps their signatures beside them, for those who override them.
    """
    found = _names(function)
    if found in ((), ("args", "kwargs")):  # dispatched on a flag: the function of the same name knows
        overrides = get_testing_overrides()
        name = getattr(function, "__name__", "")
        same = next((f for f in (function, getattr(torch, name, None)) if f in overrides), None)
        found = _names(overrides[same]) if same is not None else ()
    return tuple("input" if name == "self" else name for name in found)


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def named(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return dict(zip(parameter_names(function), args)) | kwargs


def writes_into_argument(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__"):
        return True
    if name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_", "retain_grad_"):
        return True
    if "inplace" in parameter_names(function):
        return named(function, args, kwargs).get("inplace") is True
    return name == "__setitem__"


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a call was given or has returned, one by one."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for each in result for t in tensors_of(each)]
    if isinstance(result, dict):
        return [t for each in result.values() for t in tensors_of(each)]
    return []


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What :func:`tensors_of` looks into, with other tensors in it."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        changed = copy.copy(tree)  # of a subclass too
        for key, value in tree.items():
            changed[key] = mapped(value, change)
        return changed
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(each, change) for each in tree))
    return type(tree)(mapped(each, change) for each in tree) if isinstance(tree, (tuple, list)) else tree
