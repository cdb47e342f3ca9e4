"""The parts of gpu_kernels.py: cases, how they are timed, and the processes that they run in."""
