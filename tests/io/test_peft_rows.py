"""Rows that PEFT trains: of tables, and of output heads, whatever axis here has the tokens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close, normal

import lora_jax
from lora_jax.io import hf, peft

pytestmark = pytest.mark.usefixtures("standard_promotion")

PRE = "base_model.model."
IDS = [5, 1]  # PEFT keeps the order in which they were given


def written(folder, module, new, ids=IDS):
    """An adapter with rows, as PEFT writes it, and factors that change nothing."""
    folder.mkdir()
    tensors = {f"{module}.token_adapter.trainable_tokens_delta": new}
    tensors |= {"q.lora_A.weight": np.ones((1, 6), "f"), "q.lora_B.weight": np.zeros((6, 1), "f")}
    file = {PRE + name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(file, folder / peft.TENSORS)
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q"]}
    config |= {"trainable_token_indices": {module: ids}}
    (folder / peft.CONFIG).write_text(json.dumps(config))
    return folder


# A leaf, its layout, and whether it is what the head multiplies by; the tokens are its first axis
# in PyTorch.
LEAVES = {
    "a head": ("lm_head/kernel", (6, 11), None),
    "a square head": ("lm_head/kernel", (6, 6), None),
    "a head stored as in PyTorch": ("lm_head/kernel", (11, 6), "oi"),
    "a square head stored so": ("lm_head/kernel", (6, 6), "oi"),
    "a head over heads": ("lm_head/kernel", (2, 3, 11), "iio"),
    "a table": ("embed/embedding", (11, 6), None),
    "a square table": ("embed/embedding", (6, 6), None),
    "a table stored transposed": ("embed/embedding", (6, 11), "oi"),
    "a table of heads": ("embed/embedding", (11, 2, 3), "ioo"),
}


def tokens_first(x, name, layout):
    """A leaf as PyTorch has it: ``[tokens, features]``."""
    letter = "o" if "head" in name.split("/")[0] else "i"
    axis = (layout or "io").index(letter)
    return np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1)


@pytest.mark.parametrize("name", LEAVES)
def test_rows_are_of_the_axis_that_has_the_tokens(name, tmp_path):
    path, shape, layout = LEAVES[name]
    module, leaf = path.split("/")
    params = {"q": {"kernel": normal(0, (6, 6))}, module: {leaf: normal(1, shape)}}
    options = {"layout": {path: layout} if layout else None, "kinds": {"lm_head.*": "Linear"}}
    new = np.asarray(normal(2, (2, 6)))
    folder = written(tmp_path / "theirs", module, new)

    lora_params = peft.load(folder, params, **options)
    expected = tokens_first(params[module][leaf], path, layout).copy()
    expected[IDS] = new
    merged = lora_jax.merge(lora_params)
    assert_close(tokens_first(merged[module][leaf], path, layout), expected)
    assert lora_params.adapter.factors[path].ids == (1, 5)

    peft.save(tmp_path / "ours", lora_params, **options)
    config = json.loads((tmp_path / "ours" / peft.CONFIG).read_text())
    assert config["trainable_token_indices"] == {module: [1, 5]}
    tensors = safetensors.numpy.load_file(tmp_path / "ours" / peft.TENSORS)
    assert_close(tensors[f"{PRE}{module}.token_adapter.trainable_tokens_delta"], new[::-1])


def test_rows_of_a_head_compute_and_train_as_merged_ones(tmp_path):
    params = {"q": {"kernel": normal(0, (6, 6))}, "lm_head": {"kernel": normal(1, (6, 6))}}
    lora_params = peft.load(
        written(tmp_path / "a", "lm_head", np.asarray(normal(2, (2, 6)))), params
    )
    x = normal(3, (4, 6))

    def fn(p, x):
        return jnp.tanh(x @ p["q"]["kernel"]) @ p["lm_head"]["kernel"]

    def loss(f):
        return lambda p: (f(p, x) ** 2).sum()

    assert_close(lora_jax.lora(fn)(lora_params, x), fn(lora_jax.merge(lora_params), x))
    _, grads = lora_jax.value_and_grad(loss(lora_jax.lora(fn)))(lora_params)
    dense = jax.grad(loss(fn))(lora_jax.merge(lora_params))["lm_head"]["kernel"]
    assert_close(grads.factors["lm_head/kernel"].b, dense[:, jnp.array([1, 5])].T)


def test_a_lookup_still_wants_rows_along_what_it_reads():
    params = {"embed": {"embedding": normal(0, (6, 11))}}
    layout = {"embed/embedding": "io"}
    wrong = lora_jax.lorafy(params, targets=[], rows={".*": [1, 5]}, layout=layout)
    lookup = lora_jax.lora(lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=1))
    with pytest.raises(ValueError, match=r"has layout 'io', but 'gather' .* layout 'oi'"):
        lookup(wrong, jnp.array([1, 2]))


@pytest.mark.parametrize("vocabulary", [11, 6])
def test_rows_of_a_head_are_merged_into_files(vocabulary, tmp_path):
    params = {
        "q": {"weight": normal(0, (6, 6))},
        "lm_head": {"weight": normal(1, (vocabulary, 6))},
    }
    hf.save(tmp_path / "model", params, hf.Family(), layout={".*": "oi"})
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    new = np.asarray(normal(2, (2, 6)))
    hf.merge(tmp_path / "model", written(tmp_path / "a", "lm_head", new), tmp_path / "out")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    expected = np.array(params["lm_head"]["weight"])
    expected[IDS] = new
    assert_close(found, expected)


def test_rows_of_a_head_s_inputs_have_no_form_in_peft(tmp_path):
    params = {"q": {"kernel": normal(0, (6, 6))}, "lm_head": {"kernel": normal(1, (6, 6))}}
    options = {"targets": "q/kernel", "rows": {"lm_head/kernel": [1, 5]}}
    wrong = lora_jax.lorafy(params, 1, **options)
    with pytest.raises(ValueError, match=r"rows of 'lm_head/kernel' .*layout=.*: 'oi'"):
        peft.save(tmp_path / "a", wrong)
    assert not Path(tmp_path / "a").exists()
    right = lora_jax.lorafy(params, 1, layout={"lm_head/kernel": "oi"}, **options)
    peft.save(tmp_path / "a", right)
    assert peft.load(tmp_path / "a", params).adapter.factors["lm_head/kernel"].layout == "oi"
