"""What the registered tests of SGLang's prefill/decode disaggregation share. Imports point one way: tests -> pdkit -> sglang."""
