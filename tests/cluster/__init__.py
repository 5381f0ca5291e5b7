"""Tests on a real Slurm, which they bring up themselves. They need root; see `bed.py`."""
