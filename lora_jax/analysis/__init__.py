"""Look into adapters: what their updates have in common, and what they do to the weights.

* :func:`similarity`, :func:`distance`, :func:`subspace_similarity`: compare adapters.
* :func:`spectra`, :func:`effective_rank`, :func:`stable_rank`: singular values of updates.
* :func:`change_per_layer`, :func:`amplification`, :func:`intruder_dimensions`: updates beside the
  weights of the base. :func:`reduce_intruders` scales intruders down.
* :func:`plot_spectra`, :func:`plot_subspaces`, :func:`plot_change`: figures (extra ``plot``).
"""

from lora_jax.analysis._amplification import Amplification, amplification
from lora_jax.analysis._intruders import Intruders, intruder_dimensions, reduce_intruders
from lora_jax.analysis._layers import change_per_layer
from lora_jax.analysis._plots import plot_change, plot_spectra, plot_subspaces
from lora_jax.analysis._similarity import distance, similarity, subspace_similarity
from lora_jax.analysis._spectra import effective_rank, spectra, stable_rank

__all__ = [
    "Amplification",
    "Intruders",
    "amplification",
    "change_per_layer",
    "distance",
    "effective_rank",
    "intruder_dimensions",
    "plot_change",
    "plot_spectra",
    "plot_subspaces",
    "reduce_intruders",
    "similarity",
    "spectra",
    "stable_rank",
    "subspace_similarity",
]
