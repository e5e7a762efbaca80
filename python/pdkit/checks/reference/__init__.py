"""Logprobs of SGLang's kernels against transformers' arithmetic on the same weights."""
