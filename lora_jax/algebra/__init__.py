"""Make adapters from adapters: combine, resize and extract them.

Sums of updates are operators: ``0.7 * math + 0.3 * code``.

* :func:`linear_in_factors`, :func:`ties`, :func:`dare`, :func:`prune`: other ways to combine.
* :func:`resize`: change the rank. :func:`extract`: find the adapter between two models.
* :func:`to_plain`: turn an adapter whose initializer changed the base into plain LoRA.
"""

from lora_jax.algebra._extract import extract
from lora_jax.algebra._linear import linear_in_factors
from lora_jax.algebra._plain import to_plain
from lora_jax.algebra._resize import resize
from lora_jax.algebra._ties import dare, prune, ties

__all__ = ["dare", "extract", "linear_in_factors", "prune", "resize", "ties", "to_plain"]
