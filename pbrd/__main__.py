"""`python -m pbrd`."""

import sys

from pbrd.cli import main

sys.exit(main())
