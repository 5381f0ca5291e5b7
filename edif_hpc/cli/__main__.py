"""`python -m edif_hpc.cli`: how components start each other, whatever is on PATH."""

from .main import app

if __name__ == "__main__":
    app(prog_name="edif-hpc")
