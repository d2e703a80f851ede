"""``python -m ilmconvert``."""

import sys

from ilmconvert_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
