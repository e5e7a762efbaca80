"""Evals: modules that SGLang gave up."""

import ast
from collections.abc import Iterator

from pdkit.core.source import Source
from pdkit.preflight.finding import Finding, broken

DEPRECATED = {f"sglang.test.{name}" for name in ("few_shot_gsm8k", "few_shot_gsm8k_engine", "simple_eval_gsm8k")}


def deprecated_eval(source: Source, _: object) -> Iterator[Finding]:
    """No eval module that SGLang deprecates, or that is gone from a release that serves DeepSeek-V4."""
    for node in source.nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(source.parents.get(node), (ast.List, ast.Tuple)):
            names = [str(node.value)]
        for name in names:
            if name in DEPRECATED:
                message = f'{name} is deprecated; use sglang.test.run_eval with eval_name="gsm8k"'
                yield broken(source.path, getattr(node, "lineno", 1), "deprecated-eval", message)
