"""Real SGLang on a machine without a GPU: its own servers, scheduler, pools and transfer, with torch in place of kernels.

`registry` says what is replaced in SGLang, `shims` by what. assets/sglang-cpu-site stands first on the servers' PYTHONPATH:
stand-ins for two packages that need libcuda, and the entry point by which SGLang calls `plugin` at start-up.
"""
