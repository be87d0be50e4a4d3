"""Compare three ways to apply an adapter for each batch row: gather, mask or sort.

The program is one projection in bfloat16 with rank 16, in a scan over layers. ``gathered``, as in
``lora_rows``, gathers each row's factors. ``masked`` multiplies with all factors and masks the
products; it is omitted if the intermediate is larger than the device. ``sorted`` sorts the rows for
``jax.lax.ragged_dot``; it is omitted if it takes seconds::

    python -m benchmarks.transform.rows            # a GPU
    python -m benchmarks.transform.rows --quick    # any device
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

RANK = 16
ROWS = ((8, 1), (64, 1), (256, 1), (1024, 1), (8, 64), (64, 64), (4, 2048), (16, 2048))
WAYS = ("base", "gathered", "masked", "sorted")


def update(way: str, x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array) -> jax.Array:
    """Compute ``(x[n] a[ids[n]]) b[ids[n]]`` for ``x[rows, tokens, in]``."""
    wide: Any = {"preferred_element_type": jnp.float32}
    if way == "gathered":
        small = jnp.einsum("rti,rik->rtk", x, a[ids], **wide).astype(x.dtype)
        return jnp.einsum("rtk,rko->rto", small, b[ids])
    if way == "masked":
        small = jnp.einsum("rti,nik->rtnk", x, a, **wide)
        mask = ids[:, None] == jnp.arange(len(a))[None]
        small = jnp.where(mask[:, None, :, None], small, 0).astype(x.dtype)
        return jnp.einsum("rtnk,nko->rto", small, b)
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=len(a)) * x.shape[1]
    rows = x[order].reshape(-1, x.shape[-1])
    small = jax.lax.ragged_dot(rows, a, sizes, **wide).astype(x.dtype)
    found = jax.lax.ragged_dot(small, b, sizes)
    return found.reshape(*x.shape[:2], -1)[jnp.argsort(order)]


def microseconds(way: str, arrays: Any, x: jax.Array, ids: jax.Array) -> float:
    """Return the median time per layer."""

    def layer(x, weights):
        w, a, b = weights
        y = x @ w
        return (y if way == "base" else y + update(way, x, a, b, ids)), None

    run = jax.jit(lambda x, arrays: jax.lax.scan(layer, x, arrays)[0])
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run(x, arrays).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[1:]) / len(arrays[0])


def main() -> None:
    """Measure all, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="small weights and few layers")
    dim, layers = (64, 2) if options.parse_args().quick else (4096, 24)

    def normal(seed: int, *shape: int) -> jax.Array:
        return 0.015 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; microseconds per layer")
    print("adapters  rows x tokens", *(f"{way:>9}" for way in WAYS))
    w = normal(0, layers, dim, dim)
    for count in (8, 64, 256):
        arrays = w, normal(1, layers, count, dim, RANK), normal(2, layers, count, RANK, dim)
        for rows, tokens in ROWS:
            x = normal(3, rows, tokens, dim)
            ids = jax.random.randint(jax.random.key(4), (rows,), 0, count)
            slow = {"sorted"} if count > 64 or rows * tokens > 4096 else set()
            slow |= {"masked"} if rows * tokens * count * RANK > 2**31 else set()
            times = [
                "        -" if way in slow else f"{microseconds(way, arrays, x, ids):9.1f}"
                for way in WAYS
            ]
            print(f"{count:8}  {rows:5} x {tokens:5}", *times)


if __name__ == "__main__":
    main()
