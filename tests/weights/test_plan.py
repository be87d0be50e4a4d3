"""``make_plan``: what trains, by path, before any factor is made."""

import jax
import numpy as np
import pytest

from lora_jax._weights.plan import make_plan

LEAVES = {
    path: jax.ShapeDtypeStruct(shape, np.float32)
    for path, shape in {
        "embed/embedding": (9, 4),
        "attn/query/kernel": (4, 6),
        "attn/value/kernel": (4, 6),
        "attn/value/bias": (6,),
        "layers/w": (3, 4, 5),
    }.items()
}
LAYOUT = {"layers/w": "bio"}


def plan(rank=2, alpha=4.0, **options):
    return make_plan(LEAVES, rank, alpha, **{"layout": LAYOUT} | options)


def shown(found):
    return [(t.path, t.layout, t.rank, t.scale, t.fan_in) for t in found.targets]


@pytest.mark.parametrize(
    ("options", "targets", "full"),
    [
        (
            {},
            [
                ("attn/query/kernel", "io", 2, 2.0, 4),
                ("attn/value/kernel", "io", 2, 2.0, 4),
            ],
            (),
        ),
        (
            {"targets": "attn/query.*", "rslora": True, "rank": 4, "bias": "all"},
            [("attn/query/kernel", "io", 4, 2.0, 4)],
            ("attn/value/bias",),
        ),
        (
            {"targets": ["attn/value.*kernel", "embed.*"], "bias": "lora_only"},
            [("embed/embedding", "io", 2, 2.0, 1), ("attn/value/kernel", "io", 2, 2.0, 4)],
            ("attn/value/bias",),
        ),
        (
            {"targets": "layers/w", "layers": [0, 2], "rank": {"layers.*": 1}},
            [
                ("layers/w[0:1, :, :]", "bio", 1, 4.0, 4),
                ("layers/w[2:3, :, :]", "bio", 1, 4.0, 4),
            ],
            (),
        ),
        (
            {"targets": "attn/query/kernel[:, 0:3]", "alpha": {".*": 1}},
            [("attn/query/kernel[:, 0:3]", "io", 2, 0.5, 4)],
            (),
        ),
        (
            {"targets": lambda path, leaf: 3 if "query" in path else False, "full": "layers.*"},
            [("attn/query/kernel", "io", 3, 4 / 3, 4)],
            ("layers/w",),
        ),
    ],
)
def test_plans(options, targets, full):
    found = plan(**options)
    assert (shown(found), found.full) == (targets, full)
    assert not found.tables


def test_tables_and_all_paths():
    found = plan(targets="attn/query.*", rows={"embed.*": [7, 2]}, full="attn/value/bias")
    assert found.tables == {"embed/embedding": ("io", (2, 7))}
    assert found.paths == ("attn/query/kernel", "embed/embedding", "attn/value/bias")
    assert [t.part.path for t in found.targets] == ["attn/query/kernel"]
