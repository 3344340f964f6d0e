"""`python -m sft` and `accelerate launch -m sft`: the same as the command `sft`."""

import sys

from sft.cli import main

sys.exit(main())
