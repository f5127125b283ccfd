"""`python -m kdaemon` and the `kdaemon` command."""

import sys

from kdaemon.cli import main

if __name__ == "__main__":
    sys.exit(main())
