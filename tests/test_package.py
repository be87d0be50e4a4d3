"""What importing the package does, and where versions are known."""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lora_jax"


def test_importing_loads_no_module_of_an_extra_and_no_flax():
    extras = "rich matplotlib safetensors tokenizers pytest hypothesis nbclient flax orbax".split()
    code = f"import sys, lora_jax; print([m for m in {extras} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_only_one_file_knows_jax_versions():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_jax.py":
            assert not re.search(r"jax\.(_src|extend|__version__)|import _src", path.read_text()), (
                path
            )
