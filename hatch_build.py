"""The package's long description and addresses, which depend on where the repository is published.

An index shows no images by relative paths. Where ``DFC_REPOSITORY`` holds the repository's address, as in a release,
links and images of the README are made absolute, at the version's tag; elsewhere they are left as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2106.07887"


class Published(MetadataHookInterface):
    """Fills in ``readme`` and ``urls``."""

    def update(self, metadata: dict) -> None:
        """Fill them in."""
        repository = os.environ.get("DFC_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {"Paper": PAPER}
        if repository:
            tag = f"v{metadata['version']}"
            text = absolute(text, repository, tag)
            metadata["urls"] |= {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Documentation": f"{repository}/tree/{tag}/docs",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown with its relative links and images as addresses in a repository."""

    def address(found: re.Match[str]) -> str:
        image, label, path = found.groups()
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/{tag}/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", address, text)
