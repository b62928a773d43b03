"""`python recipes/gatt.py CONFIG.yaml key=value ...`: the same call as `align gatt`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "gatt", *sys.argv[1:]]
    main()
