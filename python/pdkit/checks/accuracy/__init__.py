"""GSM8K: one look as SGLang's tests take it, or a gate with stated error rates."""
