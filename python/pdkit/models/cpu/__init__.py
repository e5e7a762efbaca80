"""A nano DeepSeek-V4: its configuration, tokenizer, data, weights and training."""
