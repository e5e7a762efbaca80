"""Real SGLang on a machine without a GPU: its own servers, scheduler, pools and transfer, with torch in place of kernels.

registry     what is replaced in SGLang, by what, and why
shims        the replacements, one module for each family of kernels
plugin       what SGLang calls at start-up: entry-point group `sglang.srt.plugins`
listing      the list of them, for docs
drift        whether an SGLang still is what the replacements were written for
plan         flags and environment of the servers
checkpoints  the models that are served: a Llama and a DeepSeek-V4 in the geometry of the kernels
requirements what the machine must have
preload      what servers and routers import, once: `pdkit.core.fork_server` forks them from that
assets/sglang-cpu-site: first on the servers' PYTHONPATH: stand-ins for two packages that need libcuda, and the entry point
"""
