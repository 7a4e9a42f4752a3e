"""`mmmamba seed`: a student whose Mamba-2 mixers start from a teacher's attention weights."""

import argparse

from mmmamba.conversion.seeding import seed_folder


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba seed` and prints which layers stay attention."""
    if args.strategy and args.num_attention is None:
        raise ValueError("--strategy places the layers of --num-attention N; give both or neither.")
    config = seed_folder(
        args.teacher,
        args.destination,
        attention=args.attention_layers or (),
        strategy=(args.strategy or "head-interleaved") if args.num_attention is not None else None,
        num_attention=args.num_attention,
        seed=args.seed,
        progress=True,
    )
    layer_types = config.text_config.layer_types
    attention = [str(index) for index, kind in enumerate(layer_types) if kind == "full_attention"]
    print(
        f"{len(layer_types) - len(attention)} Mamba-2 layers seeded; attention stays in "
        f"{', '.join(attention) or 'no layer'}."
    )
    print(f"written to {args.destination}; it needs distillation before it answers well")
