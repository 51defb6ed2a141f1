"""Tensors of samples that no layer has made: the network's input, and what is made of it before the first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dfc_lightning.operations.arguments import tensors_of
from dfc_lightning.operations.laying import laid
from dfc_lightning.operations.layout import FIRST, Layout
from dfc_lightning.operations.operation import Slot, slots_in
from dfc_lightning.operations.recognise import Call


class Outside:
    """Where the samples lie in each of them; holds none of them alive."""

    def __init__(self) -> None:
        self._layouts = WeakIdKeyDictionary()

    def __len__(self) -> int:
        return len(self._layouts)

    def layout(self, tensor: Tensor) -> Layout | None:
        """Where the samples lie in a tensor; None if it is none of these."""
        return self._layouts.get(tensor)

    def expect(self, tree: Any) -> int:
        """Take what a module is given for samples, in the first dimension; their number."""
        given = [t for t in tensors_of(tree) if t.dim()]
        batch = given[0].shape[0] if given else 0
        for each in given:
            if each.shape[0] == batch:
                self._layouts[each] = FIRST
        return batch

    def follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Note where the samples lie in what a call has made of them."""
        values: list[Tensor] = []
        layouts: list[Layout | str] = []

        def slotted(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                layout = self.layout(tree)
                if layout is None:
                    return tree
                values.append(tree)
                layouts.append(layout)
                return Slot(len(values) - 1)
            if isinstance(tree, dict):
                return {k: slotted(v) for k, v in tree.items()}
            return type(tree)(map(slotted, tree)) if type(tree) in (tuple, list) else tree

        slots = slotted(tuple(args)), slotted(kwargs)
        if not values or not (made := tensors_of(result)) or all(t in self._layouts for t in made):
            return
        inputs, outputs = slots_in(slots), [Slot(len(values) + k) for k in range(len(made))]
        for each, layout in zip(made, laid(Call(func, *slots, inputs, outputs, [*values, *made]), layouts)):
            if not isinstance(layout, str):
                self._layouts[each] = layout
