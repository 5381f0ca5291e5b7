"""edif_hpc: remote nnsight experiments on clusters where nobody has root and nothing runs for ever.

The package's own face is lazy, so that importing it on a login node costs nothing and pulls in no torch.
"""

__version__ = "0.1.0"
