"""Stands for the wheel sgl-flash-mla, which needs libcuda.so.1; what is called of it is replaced by the shims."""

from pdkit.deployment.cpu.stand_in import absent_from

__getattr__ = absent_from("flash_mla")
