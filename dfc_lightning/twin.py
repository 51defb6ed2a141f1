"""The strategies for ``pytorch_lightning``, the other name of the library, whose classes are others of the same source.

``pytorch_lightning`` is made from ``lightning`` by renaming its imports; so are the strategies here. Once it is
imported, the modules of :mod:`dfc_lightning.training` are loaded a second time with their imports renamed, and the two
strategies of a kind know each other: a trainer of either name takes either, and a strategy that is given to the other
one's trainer goes on as its twin.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OURS, THEIRS = "lightning.pytorch", "pytorch_lightning"
_SOURCE, _TWIN = "dfc_lightning.training", "dfc_lightning.training_twin"
_RENAMED = {OURS: THEIRS, "lightning.fabric": "lightning_fabric", _SOURCE: _TWIN}
_twins: dict[type, dict[str, type]] = {}


def serve_both_names() -> None:
    """Offer the strategies under both names, as soon as ``pytorch_lightning`` is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if THEIRS in sys.modules:
        _serve()


def twin_for(strategy: type, of_trainer: Any) -> type:
    """The class of the strategy for the trainer that ``of_trainer``, an object of the library's, belongs to."""
    name = next((n for n in (OURS, THEIRS) for c in type(of_trainer).__mro__ if c.__module__.startswith(f"{n}.")), OURS)
    return _twins.get(strategy, {}).get(name, strategy)


def _serve() -> None:
    try:
        ours, theirs = import_module(f"{_SOURCE}.strategy"), import_module(f"{_TWIN}.strategy")
        bases = import_module(f"{THEIRS}.strategies")
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules[THEIRS], "__version__", "")
        warnings.warn(
            f"dfc_lightning cannot serve this pytorch_lightning {version}: its strategies are known to `import "
            f"lightning` only. Upgrade pytorch_lightning to 2.5 or later, or import lightning. ({error})",
            stacklevel=2,
        )
        return
    for name, base in (("DFCStrategy", bases.SingleDeviceStrategy), ("DFCDDPStrategy", bases.DDPStrategy)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        _twins[mine] = _twins[other] = {OURS: mine, THEIRS: other}
        base.register(mine)
        mine.register(other)
    import_module(f"{_SOURCE}.controlled").ControlledTraining.register(
        import_module(f"{_TWIN}.controlled").ControlledTraining
    )


class _Finder(MetaPathFinder):
    """Finds the second set of modules, and notices the import of ``pytorch_lightning``."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == THEIRS:
            others = (finder for finder in sys.meta_path if finder is not self)
            spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _Noticed(spec.loader)
            return spec
        if name != _TWIN and not name.startswith(f"{_TWIN}."):
            return None
        source = PathFinder.find_spec(_renamed(name, {_TWIN: _SOURCE}), import_module(_SOURCE).__path__)
        if name == _TWIN:
            return ModuleSpec(name, _Renamed(import_module(_SOURCE).__file__ or ""), is_package=True)
        if source is None or source.origin is None:
            return None
        return ModuleSpec(name, _Renamed(source.origin), origin=source.origin)


class _Noticed(Loader):
    """Loads ``pytorch_lightning`` as ever, and serves it then."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _serve()


class _Renamed(Loader):
    """Runs a source file with its imports renamed."""

    def __init__(self, file: str) -> None:
        self._file = file

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        with open(self._file, encoding="utf-8") as source:
            tree = ast.parse(source.read(), self._file)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                node.module = _renamed(node.module, _RENAMED)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    alias.name = _renamed(alias.name, _RENAMED)
        module.__file__ = self._file
        exec(compile(tree, self._file, "exec", dont_inherit=True), module.__dict__)


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
