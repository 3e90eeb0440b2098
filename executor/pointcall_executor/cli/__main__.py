"""`python -m pointcall_executor.cli`: the same as `pointcall`, where the script is not on the path."""

import sys

from pointcall_executor.cli import main

sys.exit(main())
