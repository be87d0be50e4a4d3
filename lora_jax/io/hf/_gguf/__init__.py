"""GGUF files: ``file`` reads bytes, ``tensor`` a tensor, ``model`` names, ``tokenizer`` words."""
