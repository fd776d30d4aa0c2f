#!/usr/bin/python3
"""Imports what a small web service does, computes something, and says so in JSON: the first useful output."""
import json
import ssl

import numpy

matrix = numpy.arange(64 * 64, dtype=float).reshape(64, 64)
print("ready: " + json.dumps({"trace": float(numpy.trace(matrix @ matrix.T)), "tls": ssl.OPENSSL_VERSION}), flush=True)
