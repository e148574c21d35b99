"""What ``benchmarks/svi_step.py`` times; nothing here does anything when run."""
