"""``python -m lora_jax.cli``."""

import sys

from lora_jax.cli import main

sys.exit(main())
