"""ONNX Runtime: writes the two halves of a model as graphs that hold our own codes, and runs them."""
