"""Execute every notebook of a folder, in that folder; fail if one fails."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in sorted(Path(sys.argv[1]).glob("*.ipynb")):
    print(path, flush=True)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    print(f"{path}: {len(notebook.cells)} cells ran")
