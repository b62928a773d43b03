"""`python recipes/distil.py CONFIG.yaml key=value ...`: the same call as `align distil`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "distil", *sys.argv[1:]]
    main()
