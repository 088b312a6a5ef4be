"""`python -m dream4d_engine.cli` is `dream4d`; torchrun starts it this way."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
