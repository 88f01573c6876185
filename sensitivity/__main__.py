"""`python -m sensitivity` is the same as `sensitivity`."""

import sys

from sensitivity.cli import main

sys.exit(main())
