"""The tiny DeepSeek-V4s: their questions, tokenizer, training and checkpoints."""
