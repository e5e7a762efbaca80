"""A DeepSeek-V4 as small as SGLang's kernels allow, with its MTP layer: configuration, checkpoint, training, truth."""
