"""Hold, check and combine adapters as data.

In reading order:

* ``factors``: the entries of an adapter: ``a``, ``b`` and ``scale`` of a weight, table rows.
* ``params``: ``Adapter`` and ``LoraParams``, and the check that they fit each other.
* ``norms``: norms of a weight's columns, for DoRA.
* ``checks``: checks of several adapters together.
* ``lowrank``: updates as pairs of matrices, and their singular values and vectors.
* ``updates``: adapters as updates of a model; ``sums``: ``0.7 * x + y``.
* ``shardings``: shardings of factors; ``place``: factors made in their place.
* ``serialize``: adapters in functions that ``jax.export`` writes, and in states of Flax.
"""

from lora_jax._adapter import serialize as serialize
from lora_jax._adapter import sums as sums  # the operators of Adapter and LoraParams
