"""What libraries tell at every start, and a person can do nothing about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_WARNINGS = (
    r".*LeafSpec\)` is deprecated",  # Lightning's, of torch
    r".*`isinstance\(treespec, LeafSpec\)`",
    r".*does not have many workers",  # data in memory want none
    r"(?s).*JsonargparseDeprecationWarning",
    r"(?s).*was deprecated in v4",
    r"skip_none parameter",
    r"Checkpoint directory .* exists and is not empty",
)
_MESSAGES = ("💡 Tip:", "`weights_only` was not set")


class _Noise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_MESSAGES)


@contextmanager
def without_noise() -> Iterator[None]:
    """Without warnings of libraries about each other, and advertisements."""
    logger, noise = logging.getLogger("lightning.pytorch.utilities.rank_zero"), _Noise()
    logger.addFilter(noise)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.removeFilter(noise)
