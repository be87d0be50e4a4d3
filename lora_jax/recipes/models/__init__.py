"""Models as pure functions of their parameters: ``llama``, ``t5``, ``deberta``."""
