"""`python recipes/rm.py CONFIG.yaml key=value ...`: the same call as `align rm`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "rm", *sys.argv[1:]]
    main()
