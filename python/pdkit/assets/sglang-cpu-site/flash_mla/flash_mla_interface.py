class FlashMLASchedMeta:
    """A schedule of GPU blocks."""
