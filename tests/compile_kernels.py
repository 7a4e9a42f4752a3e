"""Compiles every Triton kernel for a GPU, without one, and prints the resources that it needs as JSON.

    python compile_kernels.py CAPABILITY HEAD_DIM DTYPE     # python compile_kernels.py 90 128 bfloat16

Each operation is called as in training, forward and backward, but kernels are compiled instead of launched. The result
maps a kernel to the most shared memory in bytes, registers and spilled bytes of any of its variants.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mmmamba.attention_mmmamba import attend
from mmmamba.triton_mmmamba import TRITON


CAPABILITY, HEAD_DIM, DTYPE = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HEADS, KV_HEADS, LENGTH = 16, 8, 512
resources = {}  # by kernel: shared memory, registers, spilled bytes


def signature(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def compile_instead(self, *args, grid, warmup, **kwargs):
    names = [parameter.name for parameter in self.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in names}
    constants = {parameter.name for parameter in self.params if parameter.is_constexpr}
    types = {name: "constexpr" if name in constants else signature(values[name]) for name in names}
    specialized = {parameter.name for parameter in self.params if not parameter.do_not_specialize} - constants
    numbers = {name for name in specialized if isinstance(values[name], int) and values[name] % 16 == 0}
    aligned = [i for i, name in enumerate(names) if isinstance(values[name], torch.Tensor) or name in numbers]
    source = ASTSource(
        self,
        types,
        constexprs={(names.index(name),): values[name] for name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: value for name, value in kwargs.items() if name not in names}
    kernel = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    before = resources.get(self.fn.__name__, (0, 0, 0))
    resources[self.fn.__name__] = [
        max(pair) for pair in zip(before, (kernel.metadata.shared, registers, spilled), strict=True)
    ]


def tensor(*shape, dtype=DTYPE):
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def main() -> None:
    JITFunction.run = compile_instead
    channels, inner = (2 * KV_HEADS + HEADS) * HEAD_DIM, HEADS * HEAD_DIM
    x = tensor(1, LENGTH, channels)
    y, last = TRITON.causal_conv(x, tensor(channels, 2), tensor(channels), None)
    (y.sum() + last.sum()).backward()
    split = x.split([KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, inner], -1)
    v, k, q = (part.unflatten(-1, (-1, HEAD_DIM)) for part in split)
    dt, A = tensor(1, LENGTH, HEADS, dtype=torch.float32), tensor(HEADS, dtype=torch.float32)
    state = tensor(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float32)
    y, last = TRITON.ssd_scan(v, k, q, dt, A, state)
    (y.sum() + last.sum()).backward()
    TRITON.gated_rmsnorm(y.detach().requires_grad_(), torch.empty_like(y), tensor(HEAD_DIM), 1e-5).sum().backward()
    normed, total = TRITON.add_rmsnorm(tensor(1, LENGTH, inner), tensor(1, LENGTH, inner), tensor(inner), 1e-5)
    (normed + total).sum().backward()
    with torch.no_grad():
        projected = tensor(1, channels + inner + HEADS)
        weights = tensor(channels, 2), tensor(channels), A, A, tensor(HEAD_DIM)
        TRITON.decode_step(projected, *weights, 1e-5, tensor(1, channels, 1), state)
        keys = torch.empty(1, KV_HEADS, LENGTH, HEAD_DIM, dtype=DTYPE)
        query, length = torch.empty(1, HEADS, HEAD_DIM, dtype=DTYPE), torch.empty(1, dtype=torch.int32)
        for mask in (None, torch.empty(1, LENGTH, dtype=torch.bool)):
            attend(query, keys, keys, mask, length, 0.1)
    json.dump(resources, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
