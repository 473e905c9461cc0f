#!/bin/sh
# Installed as qshard-prep: runs the data preparation that lies beside it. QSHARD_PYTHON names a Python with the packages of
# requirements.txt, for example that of a virtual environment.
exec "${QSHARD_PYTHON:-python3}" "$(dirname "$0")/../share/qshard/prep/qshard_prep.py" "$@"
