"""Files and folders that are written whole or not at all, at every step of the way."""

import os

import pytest

from lora_jax.io import _files

STEPS = "fsync", "rename", "replace", "unlink", "remove", "rmdir"


def write(path, text):
    """A file, or a folder of two, whatever ``path`` is."""
    if "folder" in path.name:
        (path / "inner").mkdir(parents=True)
        (path / "one").write_text(text)
        (path / "inner" / "two").write_text(text)
    else:
        path.write_text(text)


def read(path):
    """What :func:`write` wrote, or None if it is not all there."""
    files = [path / "one", path / "inner" / "two"] if "folder" in path.name else [path]
    texts = {file.read_text() if file.exists() else None for file in files}
    return texts.pop() if len(texts) == 1 else None


def save(path, text, after):
    """Write under ``path``, with ``after(step, args)`` called behind each step of the system."""

    def watched(name, do):
        def step(*args, **kwargs):
            found = do(*args, **kwargs)
            after(name, args)
            return found

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(_files, "_exchange", watched("exchange", _files._exchange))
        with _files.written_aside(path, overwrite=True, owns=["one", "inner"]) as partial:
            write(partial, text)


@pytest.mark.parametrize("name", ["a_file", "a_folder"])
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(name, tmp_path):
    flushed = []

    def after(step, args):
        if step == "fsync":
            flushed.append(os.fstat(args[0]).st_ino)
        else:
            flushed.append(step)

    save(tmp_path / name, "new", after)
    (moved,) = [i for i, entry in enumerate(flushed) if entry == "rename"]
    written = [tmp_path / name, *(tmp_path / name).rglob("*")]
    assert {file.stat().st_ino for file in written} <= set(flushed[:moved])
    assert tmp_path.stat().st_ino in flushed[moved:]
    assert read(tmp_path / name) == "new"


@pytest.mark.parametrize("name", ["a_file", "a_folder"])
def test_what_is_overwritten_is_whole_at_every_step(name, tmp_path):
    write(tmp_path / name, "old")
    seen = []
    save(tmp_path / name, "new", lambda step, args: seen.append((step, read(tmp_path / name))))
    texts = [text for _, text in seen]
    moved = texts.index("new")
    assert texts == ["old"] * moved + ["new"] * (len(texts) - moved), seen
    assert seen[moved][0] in ("replace", "exchange")
    assert [p.name for p in tmp_path.iterdir()] == [name]
