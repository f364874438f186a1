"""`python -m ghostfunc` is the command `ghostfunc`: torchrun starts modules."""

import sys

from ghostfunc.cli import main

if __name__ == "__main__":
    sys.exit(main())
