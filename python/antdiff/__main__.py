"""``python -m antdiff``, as ``torchrun -m antdiff`` starts it."""

import sys

from antdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
