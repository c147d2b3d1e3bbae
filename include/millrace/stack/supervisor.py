"""The process behind `millrace up`: `python -m millrace.stack.supervisor` keeps the stack until a signal ends it."""

import logging
import sys

from millrace.errors import MillraceError
from millrace.settings import read_settings
from millrace.stack.running import Stack


def main() -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    try:
        with Stack(read_settings()) as stack:
            stack.wait()
    except MillraceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
