"""`python3 -m pdkit`: the same as the command `pdkit`."""

import sys

from pdkit.cli.main import main

sys.exit(main())
