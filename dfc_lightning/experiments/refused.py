"""What the parser says of an option that it refuses, in a line: the option, the reason, and what it may have meant."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from inspect import isabstract
from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric

_SCAFFOLD = (
    r"$|Parser key|Does not validate|Subtypes:|Errors:|Problem with given|Given value|Expected a <class|Expected type"
    r"|Type typing\.|Expected a path but .* either not accessible|Expected a dot import path string"
)
_VALUE = re.compile(r"Given value: (?:NestedArg\(key=.*, val='(.*)'\)|([^\n]*?))(?:\. Got value.*)?$", re.MULTILINE)
_KINDS = {
    "network": "torch.nn.modules.module.Module",
    "method": "dfc_lightning.feedback_learning.method.FeedbackMethod",
    "settling": "dfc_lightning.settling.settled.Settling",
}
"""Of options of which the parser does not tell it."""
_NO_NETWORK = (LightningModule, Metric)
_CLASS = re.compile(r"<class '([\w.]+)'>")


def told(message: str, options: Iterable[str] = ()) -> str:
    """A report on every branch of nested unions, shortened to the innermost option and what is wrong with it.

    Args:
        message: the parser's.
        options: those that the command has.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys:
        unknown = re.search(r"nrecognized arguments: (--[\w.+-]+)", message)
        near = difflib.get_close_matches(unknown[1], list(options), 1) if unknown else []
        return f"{message}{_asked(near, '.')}"
    inner = message[message.rindex('Parser key "') :]
    value = re.search(
        r"Given value: (?:NestedArg\(key=.*, val='(.*)'\)|([^\n]*?))(?:\. Got value.*)?$", inner, re.MULTILINE
    )
    inner = inner.partition("Given value")[0]
    lines = [re.sub(r'^Parser key "[^"]+":\s*', "", line.strip().removeprefix("- ")) for line in inner.splitlines()]
    reasons = list(dict.fromkeys(line for line in lines if not re.match(_SCAFFOLD, line)))
    if not reasons and value is not None:
        reasons = [_expected(inner, value[1] or value[2], keys[-1])]
    return f"--{'.'.join(keys)}: {'; '.join(reasons)}" if 1 <= len(reasons) <= 2 else message


def _expected(message: str, value: str, key: str) -> str:
    """What could stand in the place of ``value``: a number, a path, or the name of a class."""
    kinds = [kind for kind in dict.fromkeys(_CLASS.findall(message)) if kind != "NoneType"]
    kinds = kinds or [_KINDS.get(key, "")]
    classes = [name for kind in kinds for name in _classes(kind)]
    if classes:
        near = difflib.get_close_matches(value.lower(), [name.lower() for name in classes], 1)
        meant = [name for name in classes if name.lower() in near]
        return f"there is no class {value!r}; ours are {', '.join(classes)}.{_asked(meant)}"
    plain = [kind for kind in kinds if kind and "." not in kind]
    return f"{value!r} is not of the type {' or '.join(plain or ['asked for'])}"


def _classes(path: str) -> list[str]:
    """Names of our classes of a kind that can be made."""
    module, _, name = path.rpartition(".")
    kind: Any = getattr(import_module(module), name, None) if module else None
    found: dict[str, Any] = {}
    left = [kind] if isinstance(kind, type) else []
    while left:
        each = left.pop()
        left.extend(each.__subclasses__())
        network_alone = issubclass(each, _NO_NETWORK) and not issubclass(kind, _NO_NETWORK)
        if _is_public(each) and not isabstract(each) and not network_alone:
            found[each.__name__] = each
    return sorted(found)


def _is_public(kind: type) -> bool:
    package = ".".join(kind.__module__.split(".")[:2])
    offering = (sys.modules.get(name) for name in ("dfc_lightning", package))
    return package.startswith("dfc_lightning.") and any(getattr(m, kind.__name__, None) is kind for m in offering)


def _asked(names: list[str], before: str = "") -> str:
    return f"{before} Did you mean {names[0]}?" if names else ""
