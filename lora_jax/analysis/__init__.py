"""Compare adapters: angles, distances and common subspaces of their updates."""

from lora_jax.analysis._similarity import distance, similarity, subspace_similarity

__all__ = ["distance", "similarity", "subspace_similarity"]
