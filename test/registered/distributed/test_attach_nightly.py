"""PD test files of SGLang's shapes attached, each process started anew, as SGLang's CI starts them, and not forked."""

import unittest

import test_attach
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=200, suite="stage-a-test-cpu", nightly=True)


class TestShapesSpawned(test_attach.TestShapes):
    is_forked = False


if __name__ == "__main__":
    unittest.main()
