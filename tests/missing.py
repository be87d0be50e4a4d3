"""Skip tests that need a missing package of an extra, or missing support for float16."""

import functools
import re

import jax
import numpy as np
import pytest

OPTIONAL = "gguf", "matplotlib", "qwix", "shtab", "tokenizers"  # packages of the extras


class Missing:
    """A plugin: hooks in a conftest apply only to its folder."""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        """Skip a file that imports a missing package, if an extra installs it."""
        report = yield
        missing = re.search(r"No module named '(\w+)'", str(report.longrepr))
        if report.failed and missing and missing[1] in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = str(collector.path), 0, f"Skipped: {missing[1]} is not installed"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self):
        """Skip if the library reports a missing package of an extra, or if float16 is missing."""
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
    """Return whether XLA compiles float16."""
    try:
        jax.jit(lambda x: x.astype("float16"))(np.ones(1, np.float32))
    except jax.errors.JaxRuntimeError:
        return False
    return True
