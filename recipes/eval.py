"""`python recipes/eval.py CONFIG.yaml key=value ...`: the same call as `align eval`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "eval", *sys.argv[1:]]
    main()
