"""`python -m qwen_analog`, the same as the command `qwen-analog`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
