"""Whether a model is DeepSeek-V4."""

import contextlib
import json
from pathlib import Path


def is_dsv4(model: str, directory: Path | None) -> bool:
    """By its config, or by its name where there is none to read."""
    names = [model]
    if directory is not None:
        with contextlib.suppress(AttributeError, OSError, ValueError, TypeError):
            config = json.loads((directory / "config.json").read_text())
            names = [config.get("model_type", ""), *config.get("architectures", ())]
    return any("deepseekv4" in "".join(filter(str.isalnum, str(name))).lower() for name in names)
