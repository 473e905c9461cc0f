"""Runs one test file: `run.py tests/prep/test_records.py`. Exit code 77 (skipped, for ctest) where a Python module is
missing, and where every test of the file was skipped."""
import importlib.util
import os
import sys
import unittest

NEEDED = ("tokenizers", "jinja2", "numpy", "h5py", "xxhash", "gguf")
SKIPPED = 77


def main(path):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {sys.executable} has no {', '.join(missing)}; ./test.sh makes build/venv, which has")
        return SKIPPED
    folder, name = os.path.split(os.path.abspath(path))
    sys.path.insert(0, folder)  # each folder of tests has its own support.py
    outcome = unittest.main(module=os.path.splitext(name)[0], argv=sys.argv[:1], verbosity=2, exit=False).result
    if not outcome.wasSuccessful() or not outcome.testsRun:
        return 1
    return SKIPPED if len(outcome.skipped) == outcome.testsRun else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
