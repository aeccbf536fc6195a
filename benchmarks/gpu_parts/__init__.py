"""The parts of benchmarks/gpu.py. A part's module has `run(context)`, which yields rows; importing it imports torch."""
