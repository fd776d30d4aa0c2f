#!/usr/bin/python3
"""Computes something with numpy and says where: the first useful output of a container."""
import platform

import numpy

matrix = numpy.arange(64 * 64, dtype=float).reshape(64, 64)
print(f"hello from python {platform.python_version()}, numpy {numpy.__version__}: trace {numpy.trace(matrix @ matrix.T):.0f}", flush=True)
