"""Called before the packages of requirements.txt are imported, so that a Python without them gives one line."""

import importlib.util
import os
import sys

EXIT_ENVIRONMENT = 8  # error class E8xx, as in src/base/status.h


def need(*names):
    """Ends the program where one of the packages is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        print(
            f"error[E801] {sys.executable}: has no {', '.join(missing)}; take the Python of the environment that was made with "
            f"pip install -r {os.path.join(here, 'requirements.txt')} (QSHARD_PYTHON names it to an installed qshard-prep)",
            file=sys.stderr,
        )
        sys.exit(EXIT_ENVIRONMENT)
