#!/usr/bin/env python3
"""Write a random DeepSeek-V4 of the size that SGLang's kernels demand; see `python3 -m pdkit.kernel_nano --help`."""

from pdkit.kernel_nano.__main__ import main

main()
