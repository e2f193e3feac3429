"""``python -m collavo``: the same as the ``collavo`` command."""

import sys

from collavo.cli import main

if __name__ == "__main__":
    sys.exit(main())
