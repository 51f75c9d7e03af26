"""`python -m qwen_analog`, the same as the command `qwen-analog`."""

import sys

from .cli import main

sys.exit(main())
