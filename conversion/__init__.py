"""Checkpoints in and out: upstream layouts, seeding, complete model folders."""
