"""An extension of griffe: docstrings as the site has them, with examples as code and without Sphinx's roles."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Reads ``Example:`` as griffe's ``Examples:``, and ``:class:`X``` as ```X```."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object, once it is read."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:class|meth|func|mod|attr):`[~.]*", "`", text)
