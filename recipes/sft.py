"""`python recipes/sft.py CONFIG.yaml key=value ...`: the same call as `align sft`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "sft", *sys.argv[1:]]
    main()
