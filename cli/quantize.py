"""`mmmamba quantize`: a model folder whose linear layers take 4 or 8 bits."""

import argparse

from mmmamba.conversion.quantize import quantize_folder


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba quantize` and prints how many bytes the weights took and take."""
    report = quantize_folder(args.source, args.destination, args.bits, progress=True)
    print(
        f"{report.layers} layers have {args.bits} bits; {report.bytes_before:,} bytes of weights are now "
        f"{report.bytes_after:,} ({report.bytes_after / report.bytes_before:.1%})"
    )
    print(f"written to {args.destination}")
