"""Measure the cost of ``lora(fn)`` compared with ``fn``."""
