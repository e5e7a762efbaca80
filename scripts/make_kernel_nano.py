#!/usr/bin/env python3
"""Write a random DeepSeek-V4 of the size that SGLang's kernels demand; see `python3 -m pdkit.models.cuda --help`."""

import sys

from pdkit.core.command import run_command
from pdkit.models.cuda.__main__ import NAME, main

sys.exit(run_command(NAME, main, sys.argv[1:]))
