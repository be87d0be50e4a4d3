"""Measure the costs of this library. The folders are those of the package.

Run from the repository root: ``python -m benchmarks.many.bank --quick``.

- ``transform/``: tracing time; DoRA, dropout and quantized bases; an adapter for each batch row.
- ``many/``: many adapters trained together, served together, and served from a bank's slots.
- ``recipes/``: the trainer's step on one and on several devices.
- ``tpu/``: such programs compiled for TPUs, on a machine without TPUs.
- ``hlo.py``: collectives and matrix products in the text of a compiled program.
- ``h200.md`` and ``tpu/aot.md``: results.
"""
