"""`python -m baby_xp`."""

import sys

from baby_xp.cli import main

if __name__ == "__main__":
    sys.exit(main())
