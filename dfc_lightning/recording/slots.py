"""What one pass has recorded: a slot for every tensor that counts, and the operations between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.layout import SHARED, Layout
from dfc_lightning.operations.linear import Same
from dfc_lightning.operations.operation import Frame, Operation, Slot
from dfc_lightning.operations.passage import Passage, hand_on


class Slots:
    """The slots and operations of a pass, and what is asked of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.output: Slot | None = None
        """Of the network's output, once it is reached."""
        self.batch = 0
        """B, once known."""
        self.layouts: list[Layout | str] = []
        """Where the samples lie in the tensor of each slot; or why nowhere."""
        self.values: list[Tensor] = []
        """The tensor of each slot, without its history."""
        self.alive: list[Tensor] = []
        """The tensor itself, which must keep its id."""
        self.passed: list[int] = []
        """Bits of the parameters that it depends on."""
        self.slots: dict[int, Slot] = {}
        """By id of the tensor."""

    def new(self, tensor: Tensor, passed: int, layout: Layout | str = "") -> Slot:
        """A slot for a tensor."""
        slot = self.nameless(tensor, passed, layout)
        self.slots[id(tensor)] = slot
        return slot

    def nameless(self, tensor: Tensor, passed: int, layout: Layout | str = "") -> Slot:
        """A slot for a tensor that is not to be found by it."""
        slot = Slot(len(self.values))
        self.alive.append(tensor)
        self.values.append(tensor.detach())
        self.passed.append(passed)
        self.layouts.append(layout)
        return slot

    def slot(self, tensor: Tensor) -> Slot | None:
        """The slot of a tensor; None if it has none."""
        return self.slots.get(id(tensor))

    def tensor(self, slot: Slot) -> Tensor:
        """The tensor of a slot, with its history."""
        return self.alive[slot]

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is known, and no samples are in it."""
        slot = self.slots.get(id(tensor))
        return slot is not None and self.shared(slot)

    def shared(self, slot: Slot) -> bool:
        """Whether no samples are in the tensor of a slot."""
        return self.layouts[slot] == SHARED

    def maker(self, slot: Slot) -> Operation:
        """The operation that gives a slot its tensor."""
        return next(each for each in self.operations if slot in each.outputs)

    def makers(self) -> dict[int, Operation]:
        """By slot, the operation that gives it its tensor."""
        return {s: each for each in self.operations for s in each.outputs}

    def dissolve(self, passage: Passage) -> None:
        """Make a passage a mere wire: the point lies further on."""
        place = self.operations.index(passage)
        self.operations[place] = Same(hand_on, [passage.source], {}, [passage.source], [passage.target])

    def move_behind(self, passage: Passage, norm: Operation) -> Passage:
        """Let a point lie behind the operation that alone hears it; what has heard that now hears the point."""
        self.dissolve(passage)
        handed = norm.outputs[0]
        arriving = Slot(len(self.values))
        self.values.append(self.values[handed])
        self.passed.append(self.passed[handed])
        self.alive.append(self.alive[handed])
        self.layouts.append(self.layouts[handed])
        norm.outputs = [arriving]
        found = Passage(arriving, handed)
        self.operations.insert(self.operations.index(norm) + 1, found)
        return found

    def program(self) -> list[Operation]:
        """The operations that lead to the output, in order."""
        assert self.output is not None
        wanted, found = {int(self.output)}, []
        for each in reversed(self.operations):
            if wanted.intersection(each.outputs):
                found.append(each)
                wanted.update(each.inputs)
        return found[::-1]

    def frame(self, program: Sequence[Operation]) -> Frame:
        """The recorded values that a program uses.

        Raises:
            ControlError: an operation mixes samples.
        """
        for each in program:
            for slot in each.outputs:
                if isinstance(reason := self.layouts[slot], str):
                    raise entangled(each.name, reason)
        used = {int(s) for each in program for s in (*each.inputs, *each.outputs)}
        values = [v if k in used else None for k, v in enumerate(self.values)]
        assert self.output is not None
        layouts = cast("list[Layout]", self.layouts)  # of those that are used
        return Frame(values, self.batch, self.values[self.output].dtype, layouts)

    def end(self) -> int:
        """Bits of the parameters that the last recorded tensor depends on."""
        return self.passed[-1] if self.passed else 0


def entangled(name: str, cause: str) -> ControlError:
    """What to say of an operation in which samples do not keep apart."""
    return ControlError(
        f"The operation {name} gives a sample another value without the other samples: {cause}. Feedback control "
        "settles each sample by itself; of what mixes samples only batch normalisation can be held. Let the network be "
        "given the samples in the first dimension, write shapes with -1 or x.shape[0] for the batch, or freeze the "
        "layers before it with requires_grad_(False)."
    )
