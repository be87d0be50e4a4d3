"""Measure the cost of DoRA, dropout, LoRA-FA and quantized bases compared with plain LoRA.

    python -m benchmarks.transform.family --dim 512 --layers 4 --tokens 512      # a CPU
    python -m benchmarks.transform.family --dim 4096 --layers 16 --tokens 4096   # a GPU

The program is a training step (loss and gradient of the adapter) of transformer blocks in bfloat16
with rank 16 on all weights; blocks are unrolled or scanned, and checkpointed or not. It prints for
each method the FLOPs and the temporary memory that XLA counts, the base's bits per weight, and the
time per step; the ratios are to plain LoRA in the same run. ``--memory`` only compiles.
"""

import argparse
import math
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

import lora_jax

METHODS = {
    "LoRA": {},
    "LoRA-FA": {"freeze": ("a",)},
    "DoRA": {"dora": True},
    "dropout": {"dropout": 0.05},
    "int8 base": {"qtype": "int8"},
    "nf4 base": {"qtype": "nf4"},
}


def block(p, x):
    """Compute one pre-norm block of ``x[batch, time, dim]``."""

    def norm(x):
        return x * lax.rsqrt((x.astype(jnp.float32) ** 2).mean(-1, keepdims=True)).astype(x.dtype)

    h = norm(x)
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, p[name]) for name in "qkv")
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores).astype(x.dtype)
    x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["o"])
    h = norm(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


LAYOUT = dict.fromkeys("qkv", "ioo") | {"o": "iio", "gate": "io", "up": "io", "down": "io"}


def model(stacked, checkpointed):
    """Make a function of parameters and activations."""
    layer = jax.checkpoint(block) if checkpointed else block

    def fn(params, x):
        if stacked:
            return lax.scan(lambda x, p: (layer(p, x), None), x, params)[0]
        for p in params:
            x = layer(p, x)
        return x

    return fn


def parameters(dim, layers, stacked):
    """Draw random weights."""
    heads = dim // 64
    shapes = dict.fromkeys("qkv", (dim, heads, 64)) | {"o": (heads, 64, dim)}
    shapes |= {"gate": (dim, 4 * dim), "up": (dim, 4 * dim), "down": (4 * dim, dim)}

    def weights(key):
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(k, shape, jnp.bfloat16) / math.sqrt(dim)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    keys = jax.random.split(jax.random.key(0), layers)
    return jax.lax.map(weights, keys) if stacked else [jax.jit(weights)(k) for k in keys]


def measure(args, stacked, checkpointed):
    """Return a row of numbers per method, and the number of parameters."""
    params = parameters(args.dim, args.layers, stacked)
    layout = {f".*{name}": "b" * stacked + letters for name, letters in LAYOUT.items()}
    count = sum(x.size for x in jax.tree.leaves(params))
    x = jax.random.normal(jax.random.key(1), (args.batch, args.tokens, args.dim), jnp.bfloat16)
    steps, rows = {}, []
    for name in args.methods:
        options = dict(METHODS[name])
        qtype, dropout = options.pop("qtype", None), options.pop("dropout", 0.0)
        base = params
        if qtype:
            quantize = jax.jit(
                lambda p, qtype=qtype: lora_jax.quant.quantize(
                    p, qtype, targets=".*", layout=layout
                )
            )
            base = quantize(params)
        lora_params = lora_jax.lorafy(base, 16, targets=".*", layout=layout, **options)
        apply = lora_jax.lora(model(stacked, checkpointed), dropout=dropout)
        key = {"lora_key": jax.random.key(2)} if dropout else {}

        def step(trainable, frozen, x, key, apply=apply):
            def loss(p):
                return (apply(p, x, **key).astype(jnp.float32) ** 2).mean()

            return lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))

        arguments = (*lora_jax.split(lora_params), x, key)
        compiled = jax.jit(step).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        others = sum(a.nbytes for a in jax.tree.leaves((arguments[0], x)))
        bits = 8 * (memory.argument_size_in_bytes - others) / count
        flops = compiled.cost_analysis()["flops"]
        rows.append([name, flops, memory.temp_size_in_bytes, bits])
        if not args.memory:
            steps[name] = compiled, arguments
            jax.block_until_ready(compiled(*arguments))
    times = {name: [] for name in steps}
    for _ in range(args.repeats if steps else 0):
        for name, (compiled, arguments) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[name].append(time.perf_counter() - start)
    for row in rows:
        row.append(statistics.median(times[row[0]]) if steps else math.nan)
    return rows, count


def main():
    """Measure all forms of the model, and print a table per form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="compile and do not run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, {device.device_kind}, dim {args.dim}, {args.layers} layers, ",
        end="",
    )
    print(f"{args.batch} x {args.tokens} tokens")
    print("(to minimum: base + temp memory, over 4.5 bits per weight + the temp memory of LoRA)")
    for stacked in (False, True):
        for checkpointed in (False, True):
            form = "scanned" if stacked else "unrolled"
            rows, count = measure(args, stacked, checkpointed)
            print(f"\n{form}, {'checkpointed' if checkpointed else 'not checkpointed'}")
            print("method       GFLOP  ratio   temp MiB  ratio  bits/weight", end="")
            print("  to minimum   ms/step  ratio")
            _, flops, temp, _, seconds = rows[0]
            for name, f, t, bits, s in rows:
                least = 4.5 / 8 * count + temp
                print(
                    f"{name:<10} {f / 1e9:>8.1f} {f / flops:>6.3f} {t / 2**20:>10.1f} "
                    f"{t / temp:>6.3f} {bits:>12.2f} {(bits / 8 * count + t) / least:>11.2f} "
                    f"{1e3 * s:>10.2f} {s / seconds:>6.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
