"""In and out: ``safetensors``, ``orbax`` and ``peft`` for adapters, ``hf`` for whole models.

Each module has ``save`` and ``load``.
"""
