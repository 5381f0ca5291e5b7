"""Slurm as the fleet sees it: text apart from commands, commands apart from decisions."""
