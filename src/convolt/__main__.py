"""``python -m convolt`` is ``convolt``."""

import sys

from convolt.cli import main

if __name__ == "__main__":
    sys.exit(main())
