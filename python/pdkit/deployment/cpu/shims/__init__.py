"""The replacements by family of kernels. Importing this package registers them; it imports nothing of SGLang."""

from pdkit.deployment.cpu.shims import (  # noqa: F401
    attention,
    compression,
    experts,
    hyper_connections,
    indexer,
    metadata,
    norm_rope,
    runtime,
    speculative,
    transfer,
)
