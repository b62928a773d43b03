"""`python recipes/ppo.py CONFIG.yaml key=value ...`: the same call as `align ppo`."""

import sys

from alignment.cli.main import main

if __name__ == "__main__":
    sys.argv = ["align", "ppo", *sys.argv[1:]]
    main()
