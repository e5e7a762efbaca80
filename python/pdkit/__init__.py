"""What the registered tests of SGLang's prefill/decode disaggregation share; imports: tests -> pdkit -> sglang."""
