"""Turns a SAM 3 checkpoint into a Triton model repository; see `python -m export --help`."""

import os

# Its Linux wheels report to Microsoft by default, and leave an identity in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported
