"""Callbacks for other people's training loops, and export to ONNX; each module needs the library it is named after."""
