"""``python -m uhd``, where the command ``uhd`` is not on the path."""

import sys

from uhd.cli import main

sys.exit(main())
