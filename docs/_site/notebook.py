"""A hook of mkdocs.yml: notebooks are pages, with the outputs they were kept with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

IMAGES = {"image/png": "data:image/png;base64,", "image/jpeg": "data:image/jpeg;base64,"}


class Notebook(File):
    """A notebook, which is a page."""

    def is_documentation_page(self) -> bool:
        """It is."""
        return True


def on_files(files: Any, config: Any) -> Any:
    """Put a page in the place of each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            page = Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls)
            page.inclusion = file.inclusion
            files.append(page)
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The Markdown of a notebook's page."""
    source = page.file.src_uri
    return markdown(json.loads(Path(page.file.abs_src_path).read_text("utf-8"))) if source.endswith(".ipynb") else None


def markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook, one after the other."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [output for each in cell["outputs"] if (output := _output(each))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str | None:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    for kind, prefix in IMAGES.items():
        if kind in data:
            return f"![]({prefix}{''.join(data[kind]).replace(chr(10), '')})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```" if "text/plain" in data else None
