"""GGUF files: their ``header``, how to ``read`` a tensor, the ``model`` and its ``tokenizer``."""
