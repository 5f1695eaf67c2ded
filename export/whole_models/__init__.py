"""Whole models as ONNX: traced from PyTorch, or grafted into graphs that others exported."""
