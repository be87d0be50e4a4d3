"""Programs on the library's public functions: the trainer of language models, and its parts.

* ``models``: Llama, T5 and DeBERTa as pure functions of parameters.
* ``attention``, ``loss``: by the fastest kernel, and without the logits of all tokens at once.
* ``lm``: data, the step, meshes and the log of a training.
* ``packages``: models and data to download.
* ``folders``: output folders that are complete or absent.
"""
