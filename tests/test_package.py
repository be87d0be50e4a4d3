"""What importing the package does, and where versions are known."""

import ast
import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax

PACKAGE = Path(__file__).parent.parent / "lora_jax"


def test_importing_loads_no_module_of_an_extra_and_no_flax():
    extras = "rich matplotlib safetensors tokenizers pytest hypothesis nbclient flax orbax".split()
    code = f"import sys, lora_jax; print([m for m in {extras} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_names_are_there_when_they_are_used():
    code = """if True:
        import sys, lora_jax
        assert "jax" not in sys.modules and "lorafy" in dir(lora_jax), "without JAX, as lora-jax"
        from lora_jax import init, lorafy
        import jax
        assert lora_jax.lorafy is lorafy and lora_jax.many.stack, "after it"
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "lorafy" in vars(lora_jax), "JAX was there, as in a user's program"


def test_help_lists_the_functions():
    text = pydoc.plain(pydoc.render_doc(lora_jax)).partition("\nFUNCTIONS\n")[2]
    for name in lora_jax.__all__:
        if inspect.isfunction(getattr(lora_jax, name)):
            assert re.search(rf"^    {name}\(", text, re.M), name


def test_only_one_file_knows_jax_versions():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_jax.py":
            assert not re.search(r"jax\.(_src|extend|__version__)|import _src", path.read_text()), (
                path
            )


def test_a_name_that_moved_says_where_it_is():
    for module, names in lora_jax._MOVED.items():
        for name in names.split():
            where = f"lora_jax.{module}.{name}"
            with pytest.raises(AttributeError, match=rf"^lora_jax\.{name} is {re.escape(where)}$"):
                getattr(lora_jax, name)
            assert name in getattr(lora_jax, module).__all__
    with pytest.raises(AttributeError, match=r"^module 'lora_jax' has no attribute 'stacks'$"):
        _ = lora_jax.stacks


def test_public_modules_say_what_is_public():
    """Every module whose path has no underscore, but for recipes, which are read as a whole."""
    names = [m.name for m in pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")]
    public = [n for n in names if "._" not in n and ".recipes" not in n]
    assert len(public) == 12
    for name in ["lora_jax", *public]:
        module = importlib.import_module(name)
        assert module.__all__ == sorted(module.__all__), name
        for each in module.__all__:
            assert getattr(module, each) is not None


def test_files_are_short_or_say_why():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 350 or "longer" in ast.get_docstring(ast.parse(text)), path


def test_io_needs_no_import_of_its_own():
    code = "import lora_jax; print(lora_jax.io.safetensors.save.__name__, dir(lora_jax.io))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["save", "['hf',", "'orbax',", "'peft',", "'safetensors']"]


def test_each_planted_fault_changes_one_place(monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    monkeypatch.syspath_prepend(PACKAGE.parent / "tests" / "planted")
    assert len(importlib.import_module("run").read_faults()) >= 40
