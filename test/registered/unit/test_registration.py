"""Registrations are read alike with and without an installed SGLang."""

import unittest

from cases import FolderCase
from pdkit.core import ci_register, paths, registration
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.registry import collect

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

MAIN = '\nif __name__ == "__main__":\n    unittest.main()\n'


class TestRegistration(FolderCase):
    def collected(self, root, rules):
        kept = dict(vars(rules))
        try:
            return collect(root, rules)
        finally:
            vars(rules).update(kept)

    def test_the_tree_of_this_repository(self):
        ours, theirs = (self.collected(paths.registered_tests(), rules) for rules in (registration, ci_register.load()))
        self.assertGreater(len(theirs.registrations), 50)
        self.assertEqual(ours.registrations, theirs.registrations)

    def test_what_is_right_and_what_is_wrong(self):
        for call, is_right in (
            ('register_cpu_ci(5, "s")', True),
            ('register_cuda_ci(est_time=5.5, suite="s", nightly=True, disabled="why")', True),
            ('register_cuda_ci(5, stage="base-c", runner_config="8-gpu-h200")', True),
            ('register_amd_ci(5, suite="")', True),
            ('register_cpu_ci(suite="s")', False),
            ('register_cpu_ci(est_time=2 * 5, suite="s")', False),
            ('register_cpu_ci(est_time="5", suite="s")', False),
            ("register_cpu_ci(5, suite=1)", False),
            ('register_cpu_ci(5, "s", nightly=1)', False),
            ('register_cpu_ci(5, "s", disabled=1)', False),
            ('register_cpu_ci(5, "s", stage="base-c", runner_config="r")', False),
            ('register_cpu_ci(5, stage="base-c")', False),
            ("register_cpu_ci(5)", False),
            ('register_cpu_ci(5, "s", False, None, 1)', False),
            ('register_cpu_ci(5, "s", other=1)', False),
            ('register_cpu_ci(5, "s", suite="t")', False),
            ('register_cpu_ci(*[5, "s"])', False),
            ('register_cpu_ci(**{"est_time": 5, "suite": "s"})', False),
            ('if True:\n    register_cpu_ci(5, "s")', False),
            ('register_tpu_ci(5, "s")', False),
            ("", False),
        ):
            for main in (MAIN, "", '\nif __name__ == "__main__":\n    pass\n'):
                with self.subTest(call, main=main):
                    self.write("test_x.py", f"import unittest\n{call}\n{main}")
                    ours, theirs = (self.collected(self.root, each) for each in (registration, ci_register.load()))
                    self.assertEqual(ours.registrations, theirs.registrations)
                    self.assertEqual(len(ours.errors), len(theirs.errors))
                    self.assertEqual(bool(ours.registrations), is_right and (main == MAIN or "disabled" in call))


if __name__ == "__main__":
    unittest.main()
