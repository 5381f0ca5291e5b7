"""Interpretability methods written as nnsight traces."""
