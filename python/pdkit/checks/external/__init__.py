"""A deployment that somebody else runs, asked over HTTP; nothing is launched or ended, no cache is emptied.

It needs neither SGLang nor torch nor transformers: `pip install sglang-pd-suite` is enough.
"""
