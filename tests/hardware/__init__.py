"""The pure estimates and parsers of `edif_hpc.hardware`."""
