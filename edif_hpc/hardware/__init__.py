"""What a machine has and what a model needs: CUDA, ROCm and CPU profiles, memory estimates. Pure; no torch at import."""
