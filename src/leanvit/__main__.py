"""`python -m leanvit`: the same as the `leanvit` command."""

import sys

from leanvit.cli import main

sys.exit(main())
