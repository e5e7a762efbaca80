"""Embedded engine: SGLang's HTTP surface over a nano DeepSeek-V4 on CPU, with real prefill/decode disaggregation.

`python3 -m pdkit.engine --model-path DIR --disaggregation-mode {null,prefill,decode} ...`; in `null` mode the same
program is the monolithic baseline. One process, one torch thread (`scheduler`), one asyncio loop (`api`, `transfer`).
"""
