"""Adapters in and out: ``safetensors``, ``orbax``, ``peft``, each with ``save`` and ``load``."""
