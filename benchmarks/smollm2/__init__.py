"""Text and scores of `benchmarks/real_teacher.py`."""
