"""From a traced graph to an ONNX file: lowering, rewrites, storage, and detectors as one graph."""
