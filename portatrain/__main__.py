"""`python -m portatrain` is the command `portatrain`."""

import sys

from portatrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
