"""Export: from a network to a bundle that has passed the gate (api), ONNX files (onnx), and the gate itself (gate)."""
