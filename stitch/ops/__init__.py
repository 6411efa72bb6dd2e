"""ONNX operators, each written in primitives."""
