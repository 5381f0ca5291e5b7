"""What a machine has and what a model needs: CUDA, ROCm and CPU, memory estimates. Pure; no torch at import."""
