"""`mmmamba env`: the packages and devices here, and what a model will use."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from mmmamba.backends_mmmamba import BACKENDS, ENVIRONMENT, backend, unavailable_reason


PACKAGES = (
    "torch", "torchvision", "transformers", "triton", "mamba-ssm", "causal-conv1d", "flash-attn", "accelerate",
    "bitsandbytes", "torchao", "optimum-quanto",
)  # fmt: skip


def usable_device(name: str | None) -> torch.device:
    """The device that `--device` names; if it is not given, the GPU or else the CPU. Raises ValueError if missing."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise ValueError("its tensors have no values")
        return device
    except Exception as error:  # torch has many ways to say so
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); try --device cpu.") from None


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba env`."""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            print(f"  {name:14} {version(name)}")
        except PackageNotFoundError:
            print(f"  {name:14} not installed")
    forced = os.environ.get(ENVIRONMENT)
    print(
        f"\n{ENVIRONMENT}={forced} (wins over config.ssm_implementation)" if forced else f"\n{ENVIRONMENT} is not set"
    )
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for name in devices:
        device = torch.device(name)
        label = f"{name}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else name
        print(f"\n{label}")
        for dtype in (torch.float32, torch.bfloat16):
            try:
                used = backend(device, dtype).name
            except ValueError as error:
                used = f"nothing ({error})"
            print(f"  {str(dtype).removeprefix('torch.'):9} Mamba-2 layers use {used}")
        for candidate in BACKENDS:
            reason = unavailable_reason(candidate, device.type, torch.bfloat16)
            print(f"    {candidate:7} {'can run' if reason is None else reason}")
        recorded = device.type == "cuda" and torch.version.cuda is not None
        print(f"  decoding steps are {'recorded as CUDA graphs' if recorded else 'run one by one'}")
    flash = (
        "flash_attention_2 can be asked for" if find_spec("flash_attn") is not None else "sdpa is the fastest there is"
    )
    print(f"\nattention layers: config._attn_implementation, sdpa by default; {flash}")
