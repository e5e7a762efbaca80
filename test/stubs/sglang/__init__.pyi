"""What SGLang has beside the stub below is Any to mypy."""

from typing import Any

def __getattr__(name: str) -> Any: ...
