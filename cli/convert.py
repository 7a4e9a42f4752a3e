"""`mmmamba convert`: a published checkpoint into a model folder of this package."""

import argparse

from mmmamba.conversion.convert import VisionPlan, convert
from mmmamba.conversion.shards import listed


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba convert` and lists the tensors that have no place in the new layout."""
    sides = {name: value for name in ("image_size", "patch_size") if (value := getattr(args, name)) is not None}
    if args.vision is None and sides:
        option = f"--{next(iter(sides)).replace('_', '-')}"
        raise ValueError(f"{option} is for new embedding layers; add --vision N, or leave it out.")
    vision = None if args.vision is None else VisionPlan(args.vision, **sides)
    report = convert(args.source, args.destination, progress=True, vision=vision)
    for reason in dict.fromkeys(report.left_out.values()):
        names = [name for name in report.left_out if report.left_out[name] == reason]
        print(f"left out: {listed(names, most=3)} ({reason})")
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.tensors} tensors written to {args.destination}")
