#!/bin/sh
# What mpirun starts instead of ssh where one machine stands for two hosts (runs.py): [-options] HOST COMMAND..., here.
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec sh -c "$*"
