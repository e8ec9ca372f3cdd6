"""``python -m antdiff``, which ``torchrun -m antdiff`` also runs."""

import sys

from antdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
