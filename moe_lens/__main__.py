"""`python -m moe_lens`: the command line, also for launchers such as torchrun."""

import sys

from moe_lens.cli import main

sys.exit(main())
