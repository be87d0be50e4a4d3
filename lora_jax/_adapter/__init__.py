"""The factors of a weight, the adapter of a model, and what can be done with both as data.

In reading order:

* ``factors``: ``a``, ``b`` and ``scale`` of one weight.
* ``params``: ``Adapter`` and ``LoraParams``, and whether these fit each other.
* ``norms``: of a weight's columns, for DoRA.
* ``checks``: what several adapters have to agree in.
* ``lowrank``: updates as pairs of matrices, and their singular values and vectors.
* ``updates``: adapters as what they add to a model; ``sums``: ``0.7 * x + y``.
* ``shardings``: where factors go; ``place``: factors made there.
"""

from lora_jax._adapter import sums as sums  # the operators of Adapter and LoraParams
