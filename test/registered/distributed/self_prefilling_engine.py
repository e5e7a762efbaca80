"""`pdkit.engine`, whose decode computes prompts itself while a file is there: it takes the state, and leaves it unused."""

import os
import sys

from pdkit.engine.__main__ import main
from pdkit.engine.service import Service

VARIABLE = "PDKIT_SELF_PREFILLING"

go_on = Service._continue


def prefill_itself(service, request, kv_transfer):
    if os.path.exists(os.environ[VARIABLE]):
        service.scheduler.generate(request)
    else:
        go_on(service, request, kv_transfer)


Service._continue = prefill_itself

if __name__ == "__main__":
    sys.exit(main())
