"""Whole networks, beside onnxruntime and OpenVINO: `benchmarks.latency` and `benchmarks.loading`."""
