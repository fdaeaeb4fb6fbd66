"""Measurements of what is served, beside its peers; benchmarks/RESULTS.md names every command."""

import logging
import warnings

import export  # noqa: F401 - before ONNX Runtime, which it keeps from reporting

# About calls of their own, which nobody here can do anything about.
warnings.filterwarnings("ignore", module=r"(sam3|torch|onnxscript|timm)\b")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
