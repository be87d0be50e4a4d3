"""Skip by name what needs something that is not here: a package of an extra, or float16."""

import functools
import re

import jax
import numpy as np
import pytest

OPTIONAL = "gguf", "matplotlib", "qwix", "shtab", "tokenizers"  # packages of our extras


class Missing:
    """A plugin, since the hooks of a conftest hold for its own folder only."""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        """Skip a file that imports what is not installed, if an extra would install it."""
        report = yield
        missing = re.search(r"No module named '(\w+)'", str(report.longrepr))
        if report.failed and missing and missing[1] in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = str(collector.path), 0, f"Skipped: {missing[1]} is not installed"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self):
        """Skip where a package of an extra is missing, as the library itself says, or float16."""
        try:
            return (yield)
        except ImportError as error:
            if "is not installed: pip install" not in str(error):
                raise
            pytest.skip(str(error))
        except jax.errors.JaxRuntimeError as error:
            if "Failed to materialize symbols" not in str(error) or has_float16():
                raise
            pytest.skip("XLA compiles no float16 for CPUs without F16C")


@functools.cache
def has_float16():
    """Whether XLA compiles float16 at all."""
    try:
        jax.jit(lambda x: x.astype("float16"))(np.ones(1, np.float32))
    except jax.errors.JaxRuntimeError:
        return False
    return True
