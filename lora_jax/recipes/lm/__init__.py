"""The trainer of language models: ``flags cache startup data mesh step job metrics agree``."""
