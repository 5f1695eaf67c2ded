"""Interpreters of programs: floating point, and exact integers as ONNX or a processor rounds them."""
