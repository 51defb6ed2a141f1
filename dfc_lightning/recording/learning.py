"""The parameters that are to be taught, as one pass uses them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from torch import Tensor, nn

from dfc_lightning.recording.points import ControlPoint


class Learning:
    """Which parameters have been used, each in the modules that it belongs to: one bit for a parameter and a module.

    Args:
        points: what :func:`find_points` has found.
        leaves: whether a call that is given some of the parameters, by name, and these tensors is left to autograd.
        idle: names of points whose parameters were seen to be used as those of other modules alone.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        leaves: Callable[[str, Sequence[Tensor]], bool],
        idle: Container[str] = (),
    ) -> None:
        self._names: list[str] = []
        self._places: dict[int, list[tuple[ControlPoint, int]]] = {}
        self.modules: dict[int, int] = {}
        """By id, the bit of a module that is controlled as a whole."""
        self.running: list[nn.Module] = []
        """The modules of the points, of those whose forward is running, the innermost last."""
        self.used = 0
        """Bits of the parameters that have been used."""
        self._leaves = leaves
        self.idle = 0
        """Bits that are not waited for."""
        for point in points:
            if point.is_named:
                self.modules[id(point.layer)] = self._bit(point.name)
                continue
            for p in point.use or point.layer.parameters(recurse=False):
                if p.requires_grad:
                    self._places.setdefault(id(p), []).append((point, bit := self._bit(point.name)))
                    self.idle |= bit if point.name in idle else 0

    def close(self) -> None:
        """Let go of who is asked."""
        self.running.clear()
        self._leaves = lambda name, given: False

    def _bit(self, name: str) -> int:
        self._names.append(name)
        return 1 << (len(self._names) - 1)

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._places

    @property
    def all(self) -> int:
        """All bits that are waited for."""
        return (1 << len(self._names)) - 1 & ~self.idle

    def is_complete(self, passed: int) -> bool:
        """Whether some bits are all, but for modules that were not run, whose parameters others have too.

        These are then not waited for any more.
        """
        shared = 0
        for places in self._places.values():
            bits = [bit for _, bit in places]
            if any(bit & passed for bit in bits):
                shared |= sum(bit for bit in bits if not bit & self.used)
        if passed | shared | self.idle != self.all | self.idle:
            return False
        self.idle |= shared
        return True

    def names(self, bits: int) -> list[str]:
        """Of the points that some bits belong to, each once."""
        return list(dict.fromkeys(name for k, name in enumerate(self._names) if bits >> k & 1))

    def places(self, parameter: Tensor) -> list[ControlPoint]:
        """The points that a parameter may belong to, first that of a module that is running, then what was not used."""
        return [point for point, _ in self._sorted(parameter)]

    def bits(self, given: Iterable[Tensor]) -> int:
        """Those of the parameters among some tensors, which are used now."""
        found = 0
        for each in given:
            if each in self:
                found |= self._sorted(each)[0][1]
        self.used |= found
        return found

    def leaves(self, given: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors is left to autograd."""
        mine = next((each for each in given if each in self), None)
        return mine is not None and self._leaves(self.places(mine)[0].name, given)

    def _sorted(self, parameter: Tensor) -> list[tuple[ControlPoint, int]]:
        places = self._places[id(parameter)]
        if len(places) == 1:
            return places
        running = {id(module): k for k, module in enumerate(self.running)}
        return sorted(places, key=lambda place: (-running.get(id(place[0].layer), -1), bool(self.used & place[1])))
