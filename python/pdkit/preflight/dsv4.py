"""Whether a model is DeepSeek-V4."""

import json
from pathlib import Path


def is_dsv4(model: str, directory: Path | None) -> bool:
    """By its config, or by its name where there is none to read."""
    try:
        config = json.loads((directory / "config.json").read_text())
        names = [config.get("model_type", ""), *config.get("architectures", ())]
    except (AttributeError, OSError, ValueError, TypeError):
        names = [model]
    return any("deepseekv4" in "".join(filter(str.isalnum, str(name))).lower() for name in names)
