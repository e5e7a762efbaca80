"""The replacements by family of kernels. Importing this package registers them; it imports nothing of SGLang."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
