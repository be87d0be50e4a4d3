"""Compile for TPUs without a TPU, and read the costs from the programs."""
