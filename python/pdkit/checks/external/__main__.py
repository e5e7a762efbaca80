"""`python3 -m pdkit.checks.external URL`: the same as `pdkit check URL`."""

import sys

from pdkit.checks.external.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
