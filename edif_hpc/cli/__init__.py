"""The `edif-hpc` command: puts the rooms together."""
