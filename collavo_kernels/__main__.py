"""``python -m collavo_kernels`` prints what ``collavo info`` prints."""

import sys

from collavo_kernels.info import main

sys.exit(main())
