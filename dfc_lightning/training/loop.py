"""The optimizer loop that teaches by feedback control. The one module that touches Lightning's private names."""

from __future__ import annotations

import contextlib
import copy
import operator
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import _OUTPUTS_TYPE, _AutomaticOptimization
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from torch.utils.data import DataLoader


class DFCOptimizerLoop(_AutomaticOptimization):
    """Lightning's automatic optimization with something to do before and after each batch.

    The update itself reaches the optimizer through ``loss.backward()``; see :mod:`dfc_lightning.network.gate`.

    Args:
        trainer: the trainer.
        before_batch: called with the batch and its index before a training step; runs the feedback stages that are
            due.
        after_batch: called with the batch's index after the optimizer has had its turn.
    """

    def __init__(
        self, trainer: pl.Trainer, before_batch: Callable[[Any, int], None], after_batch: Callable[[int], None]
    ) -> None:
        super().__init__(trainer)
        self._before_batch, self._after_batch = before_batch, after_batch

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict) -> _OUTPUTS_TYPE:
        """Run the stages that are due, then the batch."""
        self._before_batch(next(iter(kwargs.values())), batch_idx)
        outputs = super().run(optimizer, batch_idx, kwargs)
        self._after_batch(batch_idx)
        return outputs

    def install(self) -> None:
        """Take the place of the trainer's optimizer loop."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        self.load_state_dict(epoch_loop.automatic_optimization.state_dict())
        epoch_loop.automatic_optimization = self


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders that training draws from."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    return combined.flattened


def training_batches(trainer: pl.Trainer, number: int) -> Iterator[Any]:
    """A pass of its own over the training data, of batches as the loaders give them.

    Args:
        trainer: the trainer.
        number: of the pass; an epoch to samplers that order the data by epoch.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    private = [_private_copy(loader, number) for loader in combined.flattened]
    with _own_generators(private):
        if len(private) == 1 and combined.iterables is combined.flattened[0]:
            batches: Iterator[Any] = iter(private[0])
        else:
            mine = CombinedLoader(combined.iterables, combined._mode)
            mine.flattened = private
            mine.limits = combined.limits
            batches = (batch for batch, _, _ in mine)
        yield from batches


def as_trained_on(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch converted and moved as for ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def step_arguments(trainer: pl.Trainer, batch: Any, batch_idx: int) -> list[Any]:
    """The arguments of the module's ``training_step`` for a batch."""
    return list(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values())


def takes_loader_iterator(trainer: pl.Trainer) -> bool:
    """Whether ``training_step`` fetches its own batches, by an argument ``dataloader_iter``."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)


def fast_forward(trainer: pl.Trainer) -> None:
    """After a restart, give the epoch the batches it would have had, from the one it was interrupted at.

    Lightning restores its counters, but starts the loader from the beginning, unless that is stateful, and before it
    has told the samplers which epoch it is.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    if fetcher is None or combined is None or takes_loader_iterator(trainer):
        return
    if all(isinstance(loader, _Stateful) for loader in combined.flattened):
        return
    if trainer.current_epoch > 0:
        by_epoch = [_set_epoch(loader, trainer.current_epoch) for loader in combined.flattened]
        workers = [getattr(loader, "num_workers", 0) > 0 for loader in combined.flattened]
        if any(map(operator.and_, by_epoch, workers)):
            iter(fetcher)  # the workers have begun on another epoch's order
    if not epoch_loop.restarting:
        return
    had = epoch_loop.batch_progress.current.completed + int(epoch_loop.restarted_on_train_batch_end)
    if had >= trainer.num_training_batches:
        return
    for _ in range(had):
        next(fetcher)
    fetcher.fetched -= had  # Lightning adds the batches of the epoch so far itself


def note_sigterm(trainer: pl.Trainer, note: Callable[[], None]) -> None:
    """Let SIGTERM be noted, and passed on to processes started from this one, in place of Lightning's own notice.

    That one broadcasts from within the handler, and has its process leave at once. If other processes were not told,
    they wait for it, and it for them.
    """
    connector, installed = trainer._signal_connector, signal.getsignal(signal.SIGTERM)
    handlers = getattr(installed, "signal_handlers", ())
    if connector._sigterm_notifier_fn not in handlers or threading.current_thread() is not threading.main_thread():
        return

    def notice(signum: int, frame: Any) -> None:
        note()
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        for handler in handlers:
            if handler != connector._sigterm_notifier_fn and callable(handler):
                handler(signum, frame)

    signal.signal(signal.SIGTERM, notice)  # until Lightning puts back what was there before it


def leave_by_sigterm(trainer: pl.Trainer) -> NoReturn:
    """End the run as Lightning does after SIGTERM."""
    trainer._signal_connector.received_sigterm = True
    raise SIGTERMException


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module, or one in it, was compiled: its forward then runs past hooks added later."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        getattr(m, "_compiled_call_impl", None) is not None or isinstance(m, torch._dynamo.OptimizedModule)
        for m in module.modules()
    )


@contextlib.contextmanager
def _own_generators(loaders: list[Any]) -> Iterator[None]:
    """Seed the loaders' own generators from torch's global one, and leave them as they were."""
    owners = [owner for loader in loaders for owner in (loader, *_samplers(loader))]
    held = {getattr(owner, "generator", None) for owner in owners}
    states = {g: g.get_state() for g in held if isinstance(g, torch.Generator)}
    for generator in states:
        generator.manual_seed(int(torch.randint(2**63 - 1, ())))
    try:
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def _private_copy(loader: Any, number: int) -> Any:
    """A loader over the same data with an iterator of its own, also where workers persist.

    So are samplers that order the data by epoch, as those of several processes do: ``number`` is the epoch to them.
    """
    if not isinstance(loader, DataLoader):
        return loader
    clone = copy.copy(loader)
    clone._iterator = None
    if any(hasattr(sampler, "set_epoch") for sampler in _samplers(loader)):
        data = (getattr(s, name, None) for s in _samplers(loader) for name in ("dataset", "data_source"))
        shared = {id(d): d for d in (loader.dataset, *data)}
        # A DataLoader forbids setting these, so past its __setattr__; copied together, as one holds the other.
        copies = copy.deepcopy({"sampler": loader.sampler, "batch_sampler": loader.batch_sampler}, shared)
        clone.__dict__.update(copies)
        _set_epoch(clone, number)
    return clone


def _set_epoch(loader: Any, epoch: int) -> bool:
    """Tell the samplers that order the data by epoch; whether there are any."""
    told = [sampler.set_epoch(epoch) for sampler in _samplers(loader) if hasattr(sampler, "set_epoch")]
    return bool(told)


@contextlib.contextmanager
def silenced(module: pl.LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing."""
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.__dict__["log"]
