"""Runs one test file: `run.py test_records`. Exit code 77 (skipped, for ctest) where a Python module is missing."""
import importlib.util
import os
import sys
import unittest

NEEDED = ("tokenizers", "jinja2", "numpy", "h5py", "xxhash", "gguf")

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(f"skipped: {sys.executable} has no {', '.join(missing)}; ./test.sh makes build/venv, which has")
    sys.exit(77)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
outcome = unittest.main(module=sys.argv[1], argv=sys.argv[:1], verbosity=2, exit=False).result
if not outcome.wasSuccessful():
    sys.exit(1)
if outcome.testsRun and len(outcome.skipped) == outcome.testsRun:
    sys.exit(77)
