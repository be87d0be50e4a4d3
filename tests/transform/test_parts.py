"""Parts of weights through the rules that move, add up and repeat their axes."""

import jax.numpy as jnp
import pytest
from helpers import assert_oracle, drawn, normal, randomize_b

import lora_jax

IN, OUT = 6, 10
# Parts at neither end: what counts from the wrong side goes wrong.
PARTS = {"columns": ["w[:, 2:5]"], "rows": ["w[1:3, :]"], "two": ["w[:, 2:5]", "w[:, 6:9]"]}


def used(p, x):
    """Every output uses the part in another way; ``v`` is whole, ``x [batch, in]``."""
    w, v = p["w"], p["v"]
    stacked = jnp.stack([w, v, v])  # along axis 0 an update fills one of three, and has no factor
    return {
        "reversed": x @ w[:, ::-1],
        "rows reversed": x @ w[::-1],
        "reversed along both": x @ w[::-1, ::-1],
        "transposed, reversed": x @ w.T[::-1].T,
        "a slice of the reversed": x @ w[:, ::-1][:, 3:],
        "stacked, summed": x @ stacked.sum(0),
        "stacked, reversed": jnp.einsum("bi,nio->bno", x, stacked[::-1]),
        "stacked, one of them": x @ stacked[1],
        "repeated, summed": x @ jnp.broadcast_to(w, (3, IN, OUT)).sum(0),
        "tiled": x @ jnp.tile(w, (1, 2)),
        "padded": x @ jnp.pad(w, ((0, 0), (2, 1))),
        "beside another, reversed": x @ jnp.concatenate([v, w], 1)[:, ::-1],
        "summed over its outputs": x @ w.sum(1),
        "negated, added": x @ (v - 2 * w),
    }


@pytest.mark.parametrize("part", PARTS)
def test_a_part_goes_through_the_rules_as_the_whole(part):
    params = {"w": normal(0, (IN, OUT)), "v": normal(1, (IN, OUT))}
    targets = [*PARTS[part], "v"]
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets=targets, init=drawn))
    assert_oracle(used, lora_params, normal(2, (3, IN)))
