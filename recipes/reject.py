"""`python recipes/reject.py CONFIG.yaml key=value ...`: the same call as `align reject`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "reject", *sys.argv[1:]]
    main()
