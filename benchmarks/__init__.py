"""Benchmarks of the served models and their peers; benchmarks/RESULTS.md names every command."""

import logging
import warnings

import export  # noqa: F401 - before ONNX Runtime, whose telemetry it turns off

# Warnings about these libraries' own calls, which cannot be fixed here.
warnings.filterwarnings("ignore", module=r"(sam3|torch|onnxscript|timm)\b")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
