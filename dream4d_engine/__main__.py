"""`python -m dream4d_engine` is `dream4d`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
