"""Measure what ``lora(fn)`` costs beside ``fn``."""
