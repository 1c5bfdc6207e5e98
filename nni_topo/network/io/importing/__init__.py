"""Networks from files: ONNX and torch.export."""
