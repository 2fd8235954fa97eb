"""``python -m agentrun.cli``."""

import sys

from agentrun.cli import main

sys.exit(main())
