"""The trainer of language models: ``flags data mesh step job metrics agree``."""
