"""Programs on the public functions of the library: the trainer of language models, and its parts.

* ``models``: Llama, T5 and DeBERTa as pure functions of parameters.
* ``lm``: data, the step, meshes and the log of a training.
* ``packages``: models and data to download; ``folders``: written as a whole or not at all.
"""
