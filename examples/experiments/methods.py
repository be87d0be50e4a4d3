"""Define the fine-tuning methods: each is a function of parameters, what trains, an optimizer.

Every method is a ``LoraParams``: LoRA's factors, or leaves that train fully. Prefixes and
bottleneck adapters are further parameters under ``"new"``, and interceptors of the model's layers
that read them. So all methods train as stacks by one program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import bert
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sweeping import optimizer
from tasks import Inputs, Task

import lora_jax

RANK, ALPHA = 8, 16.0
BOTTLENECK = 8  # width; as many parameters as LoRA
EMBEDDED, LAYERED = 16, 32  # prefix tokens; as many parameters as LoRA for those of layers
HEAD = "classifier/.*"


class Built(NamedTuple):
    """A method over one base.

    Attributes:
        fn: ``(params, ids, mask) -> logits``.
        lora_params: the base and what trains.
        tx: the optimizer; its highest learning rate is data in its state.
    """

    fn: Callable[..., jax.Array]
    lora_params: lora_jax.LoraParams
    tx: Any


@dataclass(frozen=True)
class Setup:
    """What the methods are built over.

    Attributes:
        model: the classifier.
        params: its parameters; the head is zero.
        task: the data, which EVA reads.
        steps: the number of steps.
    """

    model: bert.Classifier
    params: Mapping[str, Any]
    task: Task
    steps: int

    @classmethod
    def of(cls, inputs: Inputs, task: Task, steps: int) -> "Setup":
        """Put a head of zeros on the encoder."""
        width = inputs.encoder.hidden_size
        head = {"kernel": jnp.zeros((width, task.classes)), "bias": jnp.zeros(task.classes)}
        params = {"encoder": jax.tree.map(jnp.asarray, inputs.params), "classifier": head}
        return cls(bert.Classifier(inputs.encoder, task.classes), params, task, steps)

    def fn(self, params: Mapping[str, Any], ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the logits of the model."""
        return self.model.apply({"params": params}, ids, mask)

    @cached_property
    def moments(self) -> dict[str, jax.Array]:
        """The second moments of what query and value read in 256 sentences."""
        plain = lora_jax.lorafy(self.params, RANK, full=HEAD)
        rows = {name: self.task.train[name][:256] for name in ("ids", "mask")}
        return jax.jit(partial(lora_jax.init.input_moments, self.fn))(plain, **rows)

    def intercepted(self, interceptor: Callable[..., Any]) -> Callable[..., jax.Array]:
        """Return ``fn`` with ``interceptor(new, next_fun, args, module)`` around its modules."""

        def fn(params, ids, mask):
            def intercept(next_fun, args, kwargs, context):
                if context.method_name != "__call__" or kwargs:
                    return next_fun(*args, **kwargs)
                return interceptor(params["new"], next_fun, args, context.module)

            own = {name: params[name] for name in ("encoder", "classifier")}
            with nn.intercept_methods(intercept):
                return self.fn(own, ids, mask)

        return fn


Build = Callable[[Setup, jax.Array], Built]


def lora(setup: Setup, key: jax.Array, *, ratio: float = 1.0, **settings: Any) -> Built:
    """Adapt query and value, or what ``settings`` of ``lorafy`` choose, and the head.

    Args:
        setup: what to build over.
        key: draws the factors.
        ratio: the learning rate of ``b`` over that of ``a``: LoRA+.
        settings: arguments of ``lorafy``.
    """
    settings = {"rank": RANK, "alpha": ALPHA, "full": HEAD} | settings
    lora_params = lora_jax.lorafy(setup.params, key=key, **settings)
    tx = optimizer(setup.steps)
    return Built(setup.fn, lora_params, tx if ratio == 1 else lora_jax.optim.lora_plus(tx, ratio))


def fully(setup: Setup, key: jax.Array, *, leaves: str) -> Built:
    """Train all leaves that match a regular expression."""
    del key
    lora_params = lora_jax.lorafy(setup.params, targets=[], full=leaves)
    return Built(setup.fn, lora_params, optimizer(setup.steps))


def eva(setup: Setup, key: jax.Array) -> Built:
    """Start LoRA from the principal inputs of the weights on 256 sentences of the task."""
    return lora(setup, key, init=lora_jax.init.eva(setup.moments))


def bottleneck(setup: Setup, key: jax.Array) -> Built:
    """Put ``x + up(gelu(down(x)))`` behind attention and MLP of each layer, and train norms.

    References:
        Houlsby et al., Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751.
    """
    width = setup.model.encoder.hidden_size
    names = [f"layer_{i}" for i in range(setup.model.encoder.num_hidden_layers)]
    new = {}
    for name in names:
        for place in ("out", "output"):
            key, own = jax.random.split(key)
            new[f"{name}_{place}"] = {
                "down": jax.random.normal(own, (width, BOTTLENECK)) / width**0.5,
                "down_bias": jnp.zeros(BOTTLENECK),
                "up": jnp.zeros((BOTTLENECK, width)),  # the model starts unchanged
                "up_bias": jnp.zeros(width),
            }

    def interceptor(new, next_fun, args, module):
        y = next_fun(*args)
        if not isinstance(module, nn.Dense) or module.name not in ("out", "output"):
            return y
        own = new[f"{module.parent.name}_{module.name}"]
        return y + nn.gelu(y @ own["down"] + own["down_bias"]) @ own["up"] + own["up_bias"]

    norms = "encoder/layer_.*_norm/.*"
    return _with_new(setup, new, interceptor, full=[norms], targets=[])


def prefix(setup: Setup, key: jax.Array, *, layers: bool, rank: int = 0) -> Built:
    """Train vectors in front of the sentence: as embeddings, or in place of each layer's inputs.

    The vectors start as embeddings of random tokens.

    Args:
        setup: what to build over.
        key: draws the tokens, and the factors.
        layers: whether every layer has vectors of its own.
        rank: adapt query and value as well, if it is not 0.

    References:
        Hu et al., arXiv:2106.09685, section 5.1: prefix-embedding and prefix-layer tuning.
    """
    encoder = setup.model.encoder
    n = LAYERED if layers else EMBEDDED
    count = encoder.num_hidden_layers if layers else 1
    tokens = jax.random.randint(key, (count, n), 1000, encoder.vocab_size)  # 1000 on: words
    table = setup.params["encoder"]["word_embeddings"]["embedding"]
    vectors = table[tokens]  # [count, n, width]
    if layers:  # the inputs of layers are normalized
        vectors = (vectors - vectors.mean(-1, keepdims=True)) / vectors.std(-1, keepdims=True)
    new = {f"prefix_{i}": vectors[i] for i in range(count)}
    last = f"layer_{encoder.num_hidden_layers - 1}"

    def put(vectors, x):
        return jnp.concatenate([jnp.broadcast_to(vectors, (len(x), *vectors.shape)), x], 1)

    def interceptor(new, next_fun, args, module):
        if module.name == "embeddings_norm" and not layers:
            return next_fun(put(new["prefix_0"], *args))
        if not isinstance(module, bert.Layer):
            return next_fun(*args)
        x, mask = args
        if layers:
            i = int(module.name.removeprefix("layer_"))
            x = put(new[f"prefix_{i}"], x if i == 0 else x[:, n:])
        y = next_fun(x, jnp.concatenate([jnp.ones((len(x), n), bool), mask], 1))
        return y[:, n:] if module.name == last else y

    adapted = {"rank": rank, "alpha": ALPHA, "key": key} if rank else {"targets": []}
    return _with_new(setup, new, interceptor, **adapted)


def _with_new(
    setup: Setup,
    new: Mapping[str, Any],
    interceptor: Callable[..., Any],
    full: list[str] | None = None,
    **settings: Any,
) -> Built:
    full = ["new/.*", HEAD, *(full or [])]
    lora_params = lora_jax.lorafy({**setup.params, "new": new}, full=full, **settings)
    return Built(setup.intercepted(interceptor), lora_params, optimizer(setup.steps))


METHODS: dict[str, Build] = {
    "full fine-tuning": partial(fully, leaves=".*"),
    "head only": partial(fully, leaves=HEAD),
    "BitFit": partial(fully, leaves=f".*/bias|{HEAD}"),
    "bottleneck": bottleneck,
    "prefix embedding": partial(prefix, layers=False),
    "prefix layer": partial(prefix, layers=True),
    "LoRA": lora,
    "LoRA + prefix": partial(prefix, layers=False, rank=RANK),
    "rsLoRA": partial(lora, rslora=True),
    "DoRA": partial(lora, dora=True),
    "PiSSA": partial(lora, init="pissa", alpha=float(RANK)),
    "LoRA+": partial(lora, ratio=16.0),
    "OLoRA": partial(lora, init="olora"),
    "EVA": eva,
}


def trained_parameters(lora_params: lora_jax.LoraParams) -> int:
    """Return how many numbers train."""
    adapter = lora_params.adapter
    full = sum(int(np.prod(leaf.shape)) for leaf in adapter.full.values())
    return full + sum(factors.size for factors in adapter.factors.values())
