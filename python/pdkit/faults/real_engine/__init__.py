"""Wrong transfers of the real engine, without a change to SGLang: its transfer backend's Python module is wrapped.

blocks    what is asked of a backend, and pure functions that make something else of it
library   the faults, by name
backends  Mooncake's engine and NIXL's agent, wrapped
server    SGLang's server with wrapped backends
checks    a mixin that asks which check sees which fault
"""
