"""`python -m sensitivity` is the same as `sensitivity`."""

import sys

from sensitivity.cli.main import main

sys.exit(main())
