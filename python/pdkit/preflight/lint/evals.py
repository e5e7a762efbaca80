"""Evals: modules that SGLang gave up."""

import ast
from collections.abc import Iterator

from pdkit.core.source import Source
from pdkit.preflight.finding import Finding, broken

DEPRECATED = {f"sglang.test.{name}" for name in ("few_shot_gsm8k", "few_shot_gsm8k_engine", "simple_eval_gsm8k")}


def deprecated_eval(source: Source, _: object) -> Iterator[Finding]:
    """No eval module that SGLang deprecates, or that is gone from a release that serves DeepSeek-V4."""
    for node in source.nodes:
        names: list[tuple[str, int]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, node.lineno), *((f"{node.module}.{a.name}", node.lineno) for a in node.names)]
        elif isinstance(node, (ast.List, ast.Tuple)):
            names = [(str(each.value), each.lineno) for each in node.elts if isinstance(each, ast.Constant)]
        for name, line in names:
            if name in DEPRECATED:
                message = f'{name} is deprecated; use sglang.test.run_eval with eval_name="gsm8k"'
                yield broken(source.path, line, "deprecated-eval", message)
