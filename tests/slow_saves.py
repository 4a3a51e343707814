"""`python slow_saves.py SECONDS WORDS...`: the command line, with every save held open long enough to be killed in."""

import os
import sys
import time

from rankgrpo.cli import main

fsync, delay = os.fsync, float(sys.argv.pop(1))


def slow_fsync(file) -> None:
    time.sleep(delay)
    fsync(file)


if __name__ == "__main__":
    os.fsync = slow_fsync
    main()
