"""Tensors that are read when they are asked for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax.cli._read.base import Absent
from lora_jax.io import hf, orbax
from lora_jax.io._tensor import Tensor, counted
from lora_jax.io.hf import _shards
from lora_jax.io.hf._names import TensorNames
from lora_jax.io.orbax._tensors import tensors_in

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b.c": jnp.ones(4, jnp.bfloat16)}


@pytest.mark.parametrize("ask", [lambda t: t.read(), np.asarray, jnp.asarray])
def test_a_tensor_is_read_when_it_is_asked_for_and_only_then(ask):
    x, reads = np.arange(6, dtype=np.int16).reshape(2, 3), []

    def read():
        reads.append(x)
        return x

    tensor = Tensor(x.shape, x.dtype, read)
    assert (tensor.nbytes, tensor.kind, reads) == (12, None, [])
    np.testing.assert_array_equal(ask(tensor), x)
    assert len(reads) == 1
    assert np.asarray(tensor, ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16


def test_files_of_every_kind_give_tensors(tmp_path):
    hf.save(tmp_path / "hf", PARAMS, hf.Family())
    orbax.save_params(tmp_path / "orbax", PARAMS)
    for found, names in (
        (_shards.tensors_in(tmp_path / "hf"), ("a.weight", "b.c")),
        (tensors_in(tmp_path / "orbax")[0], ("a/kernel", "b.c")),
    ):
        for name, x in zip(names, (PARAMS["a"]["kernel"], PARAMS["b.c"]), strict=True):
            tensor = found[name]
            assert type(tensor) is Tensor
            expected = np.asarray(x).T if name == "a.weight" else np.asarray(x)
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_array_equal(tensor.read(), expected)


def test_the_writer_reads_every_tensor_once_in_the_order_of_the_files(tmp_path):
    reads = []

    def made(k):
        reads.append(k)
        return np.full((2, 3), k, np.float32)

    tensors = {str(k): Tensor((2, 3), np.dtype(np.float32), lambda k=k: made(k)) for k in range(4)}
    _shards.write(tmp_path, tensors, shard_size=48)
    assert reads == [0, 1, 2, 3]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    found = _shards.tensors_in(tmp_path)
    assert [float(found[str(k)].read()[0, 0]) for k in range(4)] == reads
    wrong = {"x": Tensor((3, 2), np.dtype(np.float32), lambda: made(4))}
    with pytest.raises(AssertionError, match=r"x: \(2, 3\) float32"):
        _shards.write(tmp_path, wrong, shard_size=48)


def test_a_leaf_is_put_together_from_its_tensors_when_it_is_read():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)  # [layers, in, out]
    tensors = {f"h.{k}.q.weight": Tensor((4, 3), x.dtype, lambda k=k: x[k].T) for k in range(2)}
    done = []
    tensors = counted(tensors, 96, lambda *numbers: done.append(numbers))
    source = hf.Source("there", tensors, None)
    family = hf.Family({"h/(.+)": r"h.{layer}.\1"})
    like = jax.ShapeDtypeStruct(x.shape, jnp.float16)
    names = TensorNames({"h/q/kernel": like}, family, source, None)
    assert [name for _, name in names.parts("h/q/kernel")] == [*tensors]
    leaf = names.leaf("h/q/kernel")
    assert (leaf.shape, leaf.dtype, done) == (x.shape, jnp.float16, [])
    np.testing.assert_array_equal(leaf.read(), x.astype(np.float16))
    assert done == [(48, 96), (96, 96)]
    wrong = {name: Tensor((3, 4), x.dtype, t.read) for name, t in tensors.items()}
    names = TensorNames({"h/q/kernel": like}, family, hf.Source("there", wrong, None), None)
    with pytest.raises(ValueError, match=r"'h\.0\.q\.weight' has shape \(3, 4\)"):
        names.leaf("h/q/kernel")


def test_a_leaf_without_entries_says_which_and_what_to_do():
    leaf = Absent("a/kernel", (2, 3), jnp.dtype("float32"))
    assert (leaf.shape, leaf.dtype, leaf.nbytes) == ((2, 3), np.float32, 24)
    for ask in (lambda t: t.read(), np.asarray):
        with pytest.raises(ValueError, match=r"the base's 'a/kernel': pass --like"):
            ask(leaf)
    lora_params = lora_jax.lorafy({"a": {"kernel": leaf}}, 1, targets=".*")
    assert lora_params.adapter.factors["a/kernel"].a.shape == (2, 1)
