"""`python -m mmmamba`."""

import sys

from mmmamba.cli import main


sys.exit(main())
