"""`python -m mmmamba`."""

import sys

from mmmamba.cli.main import main


sys.exit(main())
