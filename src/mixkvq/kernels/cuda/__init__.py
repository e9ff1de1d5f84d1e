"""CUDA kernels for the shapes that people run, compiled on first use with NVRTC; Triton serves every other shape."""
