"""``python -m twotower_eval.cli``."""

import sys

from twotower_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
