"""The mixer's operations on a CPU with kernels of our own, which a C compiler at hand builds once.

- A decoding step of a whole Mamba-2 layer is one call: norms, products, convolution, recurrence and MLP.
- Linear layers with few rows of input, and quantised ones with any number (`quantization_mmmamba`), are one call each.
- Prompts use the torch backend.

The library is compiled for this very processor with `cc` (or what the environment variable `CC` names) and OpenMP, in
some seconds, and kept in `~/.cache/mmmamba/kernels` (or below `XDG_CACHE_HOME`). Where that fails a warning says why,
and nothing is lost but speed. `CC` may have options, which count more than ours: `CC="gcc -march=x86-64"`.
The kernels run on the threads that torch uses (`torch.set_num_threads`, or `OMP_NUM_THREADS`), but on no more than the
process has cores for.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.func import debug_unwrap
from transformers.utils import logging

from .cpu_kernels_mmmamba import SOURCE
from .ssm_mmmamba import ENVIRONMENT, TORCH
from .ssm_mmmamba import decode_step as torch_decode_step


logger = logging.get_logger(__name__)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
KINDS = DTYPES | {4: 2, 8: 3}  # of a matrix: a dtype, or the bits of a quantised one
TILE, GROUP = 16, 32  # rows and columns of a block of a quantised matrix
SCALES = 2 * TILE  # bytes of a block's scales
SECONDS_TO_COMPILE = 120


def bytes_per_block(bits: int) -> int:
    """Bytes of a tile's group, 16 rows times 32 inputs: their scales and integers."""
    return SCALES + TILE * GROUP * bits // 8


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """The shape of a quantised weight, (tiles, groups, bytes)."""
    return -(-out_features // TILE), in_features // GROUP, bytes_per_block(bits)


# --- the C structures ------------------------------------------------------------------------------------------------


class Vector(Structure):
    """Numbers in fp32 or bf16."""

    _fields_ = (("data", c_void_p), ("dtype", c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Vector":
        return cls() if tensor is None else cls(tensor.data_ptr(), DTYPES[tensor.dtype])


class Matrix(Structure):
    """Weight and bias of a linear layer."""

    _fields_ = (("weight", c_void_p), ("bias", Vector), ("rows", c_int64), ("columns", c_int64), ("kind", c_int64))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, rows: int, columns: int, kind: int) -> "Matrix":
        return cls(weight.data_ptr(), Vector.of(bias), rows, columns, kind)


class Layer(Structure):
    """A decoder layer; what its kind has not got stays empty."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_size", "taps", "mlp", "dtype")),
        *((name, c_double) for name in ("norm_eps", "mixer_eps", "mlp_eps")),
        *((name, Matrix) for name in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")),
        *((name, Matrix) for name in ("gate_proj", "up_proj", "down_proj")),
        *(
            (name, Vector)
            for name in ("norm", "mlp_norm", "conv_weight", "conv_bias", "A_log", "dt_bias", "mixer_norm")
        ),
    )


class Past(Structure):
    """Keys and values that were read."""

    _fields_ = (
        ("keys", Vector), ("values", Vector),
        *((name, c_int64) for name in ("tokens", "key_row", "key_head", "key_token")),
        *((name, c_int64) for name in ("value_row", "value_head", "value_token")),
    )  # fmt: skip


# --- compiling -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled kernels are kept, and nothing else: nobody but its owner may write there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmmamba" / "kernels"


@lru_cache
def usable_cores() -> int:
    """Cores that this process may keep busy: by its affinity, and by the quota of the container it runs in.

    Threads beyond a quota are stopped for the rest of each period, in the middle of work that the others wait for.
    A quota is rounded up to whole cores, else a part of it would lie idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in _quotas():
        if quota > 0 and period > 0:
            cores = min(cores, -(-quota // period))
    return max(cores, 1)


def _quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Quota and period of this process' control groups in microseconds, of version 2 and then 1, if there are any."""
    with suppress(OSError, ValueError):
        lines = own.read_text(encoding="utf-8").splitlines()
        groups = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
        path = root / groups[0].lstrip("/") if groups else root
        for folder in (path, *path.parents):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
                if quota != "max":
                    yield int(quota), int(period)
            if folder == root:
                break
    with suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        yield tuple(int((root / "cpu" / name).read_text(encoding="utf-8")) for name in names)


@lru_cache
def _processor() -> str:
    """What compiled code must fit: one cache may serve machines of several kinds."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: each machine has libraries of its own
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    lines = re.findall(r"^(?:model|model name|cpu family|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE)
    return "\n".join(sorted(set(lines)))


def _openmp_of_torch() -> str | None:
    """The OpenMP library that torch itself calls; None if that cannot be told.

    Other packages bring theirs, sentencepiece for one: on its threads the kernels would fight with torch's for the
    cores, and a process that has not loaded it could not load the kernels.
    """
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
        address = ctypes.cast(library.omp_get_max_threads, c_void_p).value
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except (OSError, AttributeError):  # not Linux, or a torch without OpenMP
        return next((str(path) for path in folder.glob("lib*omp*.dylib")), None)
    # address range, permissions, offset, device, inode, path
    for first, end, path in re.findall(r"^([0-9a-f]+)-([0-9a-f]+)(?: +[^ ]+){4} +(/.*)$", maps, re.MULTILINE):
        if int(first, 16) <= address < int(end, 16):
            return path
    return None


def _commands(compiler: list[str], source: str, target: str) -> list[list[list[str]]]:
    """Ways to compile, each as the commands to run one after the other."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    options = ["-O3", native, "-fPIC", "-fno-math-errno", "-Wno-psabi"]
    openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    # The user's options come last, since the last of contradicting ones counts.
    first = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    compiler, given = compiler[:first], compiler[first:]
    object_file = f"{target}.o"
    ways = []
    if library := _openmp_of_torch():
        ways.append([
            [*compiler, *options, *openmp, *given, "-c", source, "-o", object_file],
            [
                *compiler, "-shared", *given, object_file, library, "-Xlinker", "-rpath", "-Xlinker",
                str(Path(library).parent), "-lm", "-o", target,
            ],
        ])  # fmt: skip
    ways.append([[*compiler, *options, *openmp, "-shared", *given, source, "-lm", "-o", target]])
    return ways


def build(folder: Path | None = None) -> Path:
    """Compiles the kernels for this processor, unless that was done before.

    Args:
        folder: Where the library is kept; `cache_folder()` if not given. Where that cannot be written, or others may
            write there, the library lives as long as the process.

    Returns:
        The library's path.

    Raises:
        OSError: if there is no compiler, it fails, or the library cannot be written anywhere.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError(
            f"there is no C compiler named {' '.join(compiler) or repr('')}; install gcc or clang, or set CC"
        )
    key = "\n".join([SOURCE, *compiler, _processor(), torch.__version__, Path(_openmp_of_torch() or "").name])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder() if folder is None else folder
    except RuntimeError:  # a user without a home
        folder = None
    if folder is not None:
        try:
            return _cached(compiler, folder, name)
        except CompilerTimeout:
            raise
        except OSError:  # it cannot be written, is full, or nothing in it may be run
            pass
    temporary = Path(tempfile.mkdtemp(prefix="mmmamba-"))
    try:
        library = _compile(compiler, temporary)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return library


class CompilerTimeout(OSError):
    """A compiler took too long; it would in another folder, too."""


def _cached(compiler: list[str], folder: Path, name: str) -> Path:
    """The library of this name in a folder, compiled unless it is there. Raises OSError where it cannot be kept."""
    for part in (folder.parent, folder):  # `parents=True` gives parents the umask's permissions
        part.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_ours(folder):
        raise PermissionError
    path = folder / name
    # A library that was cut off by a full disk, or needs other system libraries, is compiled anew.
    if path.exists() and _is_ours(path) and _reason_not_to_load(path) is None:
        return path
    temporary = Path(tempfile.mkdtemp(dir=folder))
    try:
        compiled = _compile(compiler, temporary)
        compiled.chmod(0o700)  # compilers leave it to the umask who may write
        os.replace(compiled, path)  # whole or not at all: other processes may compile, too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written a file that is about to be run, or can write into this folder."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _reason_not_to_load(library: Path) -> str | None:
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error).removeprefix(f"{library}: ")
    return None


def _compile(compiler: list[str], folder: Path) -> Path:
    """The library, compiled in this folder. Raises OSError with the reason."""
    source, target = folder / "kernels.c", folder / "kernels.so"
    source.write_text(SOURCE, encoding="utf-8")
    for commands in _commands(compiler, str(source), str(target)):
        reason = next(filter(None, map(_run, commands)), None)
        if reason is None:
            reason = _reason_not_to_load(target)  # Clang's calls are not in GCC's OpenMP, which only shows here
        if reason is None:
            return target
    raise OSError(f"{' '.join(compiler)} cannot compile them with OpenMP: {reason}")


def _run(command: list[str]) -> str | None:
    """Why a command of a compiler failed; None if it did not. Raises OSError if it cannot be run, or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            env=os.environ | {"LC_ALL": "C"}, timeout=SECONDS_TO_COMPILE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CompilerTimeout(f"{command[0]} took more than {SECONDS_TO_COMPILE} s") from None
    except OSError as error:
        raise OSError(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode == 0:
        return None
    found = re.search(r"(?:error: |cannot find ).*", done.stderr)
    return found[0].removeprefix("error: ") if found else "it gave no reason"


# --- calling ---------------------------------------------------------------------------------------------------------


def is_ordinary(x: Tensor) -> bool:
    """Whether a kernel may read `x` by its address.

    Not what is traced, of a subclass, in a `torch.func` transform, or has a tangent of forward-mode differentiation:
    only torch's own operations know what to do with these.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and type(x) is Tensor and unpack_dual(x).tangent is None and debug_unwrap(x) is x


class Kernels:
    """The compiled functions.

    Args:
        path: The library.
    """

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        signatures = {
            "layer_step": (POINTER(Layer), c_int64, *[c_void_p] * 5),
            "decode_step": (POINTER(Layer), c_int64, *[c_void_p] * 5),
            "attention_projections": (POINTER(Layer), c_int64, *[c_void_p] * 7),
            "attention_step": (POINTER(Layer), c_int64, c_void_p, c_void_p, POINTER(Past), c_void_p, c_void_p),
            "multiply": (POINTER(Matrix), c_int64, c_void_p, c_void_p, c_int64, c_void_p),
            "bytes_for_layer": (POINTER(Layer), c_int64),
            "bytes_for_product": (POINTER(Matrix), c_int64),
            "bytes_for_projections": (POINTER(Layer), c_int64),
            "bytes_for_attention": (POINTER(Layer), c_int64, POINTER(Past)),
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int64 if name.startswith("bytes") else None
            setattr(self, f"_{name}", function)
        self._set_most_threads = library.set_most_threads
        self._set_most_threads.argtypes, self._set_most_threads.restype = (c_int64,), None
        self.set_most_threads(usable_cores())
        if hasattr(os, "register_at_fork"):  # OpenMP's threads do not come along, and it waits for them for ever
            os.register_at_fork(after_in_child=lambda: self.set_most_threads(1))

    def set_most_threads(self, count: int) -> None:
        """Lets the kernels run on so many threads, or as many as torch does, whichever is less."""
        self._set_most_threads(count)

    def multiply(self, x: Tensor, weight: Tensor, bits: int, out_features: int) -> Tensor:
        """`x` times a quantised weight, dequantised and transposed; `x` is rounded to 8 bits in groups of 32.

        Args:
            x: (rows, in), fp32 or bf16.
            weight: (tiles, in / 32, bytes), uint8, in the format of `quantization_mmmamba`.
            bits: 4 or 8.
            out_features: Rows of the weight that count, out.

        Returns:
            (rows, out) in the dtype of `x`.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit each other.
        """
        blocks = packed_shape(out_features, x.shape[-1], bits)
        if x.ndim != 2 or x.shape[1] % GROUP or tuple(weight.shape) != blocks or weight.dtype != torch.uint8:
            raise ValueError(
                f"A product of {tuple(x.shape)} inputs with {bits}-bit blocks {tuple(weight.shape)} of "
                f"{weight.dtype} is none; expected uint8 blocks {blocks} and inputs in groups of {GROUP}."
            )
        return self._product(x, weight.contiguous(), None, out_features, bits)

    def multiply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` for few rows.

        Args:
            x: (rows, in), fp32 or bf16.
            weight: (out, in), fp32 or bf16, contiguous.
            bias: (out,), fp32 or bf16.

        Returns:
            (rows, out) in the dtype of `x`.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit each other.
        """
        if weight.ndim != 2 or weight.shape[1:] != x.shape[1:] or weight.dtype not in DTYPES:
            raise ValueError(
                f"A product of {tuple(x.shape)} inputs with a {weight.dtype} weight {tuple(weight.shape)} is none; "
                "expected inputs (rows, in) and a weight (out, in) in fp32 or bf16."
            )
        return self._product(x, weight.contiguous(), bias, len(weight), weight.dtype)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, kind) -> Tensor:
        for tensor in (x, weight) if bias is None else (x, weight, bias):
            if tensor.device.type != "cpu" or (tensor is not weight and tensor.dtype not in DTYPES):
                raise ValueError(
                    f"A tensor of a product is {tensor.dtype} on {tensor.device}; the CPU kernels take inputs and "
                    "biases in fp32 or bf16, on the CPU."
                )
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"A bias has shape {tuple(bias.shape)}, and {rows} results are added to it.")
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        matrix = Matrix.of(weight, bias, rows, x.shape[1], KINDS[kind])
        y = x.new_empty(len(x), rows)
        memory = torch.empty(self._bytes_for_product(byref(matrix), len(x)), dtype=torch.uint8)
        if len(x):
            pointers = (x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], memory.data_ptr())
            self._multiply(byref(matrix), len(x), *pointers)
        return y

    def decode_step(
        self,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        eps: float,
        conv_state: Tensor,
        state: Tensor,
    ) -> Tensor:
        """See `ssm_mmmamba.decode_step`. Raises ValueError if shapes do not fit each other."""
        (batch, heads, size, _), (channels, taps) = state.shape, conv_weight.shape
        shapes = [x.shape for x in (projected, conv_bias, A_log, dt_bias, norm_weight, conv_state, state)]
        expected = [(batch, channels + heads * size + heads), (channels,), (heads,), (heads,), (size,)]
        expected += [(batch, channels, taps - 1), (batch, heads, size, size)]
        if shapes != expected:
            raise ValueError(
                f"A step's projections, parameters and states have shapes {[tuple(shape) for shape in shapes]}; "
                f"expected {expected}."
            )
        projected = projected.contiguous()
        conv_weight, conv_bias, A_log, dt_bias, norm_weight = (
            (x if x.dtype in DTYPES else x.float()).contiguous()
            for x in (conv_weight, conv_bias, A_log, dt_bias, norm_weight)
        )
        layer = Layer(
            heads=heads, kv_heads=(channels // size - heads) // 2, head_size=size, taps=taps,
            dtype=DTYPES[projected.dtype], mixer_eps=eps, conv_weight=Vector.of(conv_weight),
            conv_bias=Vector.of(conv_bias), A_log=Vector.of(A_log), dt_bias=Vector.of(dt_bias),
            mixer_norm=Vector.of(norm_weight),
        )  # fmt: skip
        out = projected.new_empty(batch, heads, size)
        memory = torch.empty(batch * (projected.shape[1] + heads * size))  # fp32 copies of what goes in and comes out
        states = conv_state.to(projected.dtype).contiguous(), state.float().contiguous()
        tensors = (projected, *states, out, memory)
        self._decode_step(byref(layer), batch, *(x.data_ptr() for x in tensors))
        for given, changed in zip((conv_state, state), states, strict=True):
            if given is not changed:
                given.copy_(changed)
        return out

    def layer_step(self, layer: Layer, x: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
        """One token per row through a Mamba-2 layer; both states change in place.

        Args:
            layer: Its sizes and weights.
            x: (B, hidden), contiguous, in the layer's dtype.
            conv_state: (B, channels, taps - 1), contiguous, in the layer's dtype.
            state: (B, H, P, P), contiguous, fp32.

        Returns:
            (B, hidden).
        """
        y = torch.empty_like(x)
        memory = torch.empty(self._bytes_for_layer(byref(layer), len(x)), dtype=torch.uint8)
        pointers = [tensor.data_ptr() for tensor in (x, conv_state, state, y, memory)]
        self._layer_step(byref(layer), len(x), *pointers)
        return y

    def attention_projections(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What one token per row brings to an attention layer.

        Args:
            layer: Its sizes and weights.
            x: (B, hidden), contiguous, in the layer's dtype.
            cos, sin: (B, P) of the token's position, contiguous, in the layer's dtype.

        Returns:
            Rotated queries (B, H, 1, P) and keys (B, K, 1, P), and values (B, K, 1, P).
        """
        rows = len(x)
        q, k, v = (x.new_empty(rows, n, 1, layer.head_size) for n in (layer.heads, layer.kv_heads, layer.kv_heads))
        memory = torch.empty(self._bytes_for_projections(byref(layer), rows), dtype=torch.uint8)
        pointers = [tensor.data_ptr() for tensor in (x, cos, sin, q, k, v, memory)]
        self._attention_projections(byref(layer), rows, *pointers)
        return q, k, v

    def attention_step(self, layer: Layer, x: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The rest of an attention layer for one token per row.

        Args:
            layer, x: As for `attention_projections`.
            q: (B, H, 1, P), contiguous.
            keys, values: (B, K, tokens, P), fp32 or bf16, numbers of a head side by side; all of them are seen.

        Returns:
            (B, hidden).
        """
        strides = (*keys.stride()[:3], *values.stride()[:3])
        past = Past(Vector.of(keys), Vector.of(values), keys.shape[2], *strides)
        y = torch.empty_like(x)
        memory = torch.empty(self._bytes_for_attention(byref(layer), len(x), byref(past)), dtype=torch.uint8)
        pointers = (y.data_ptr(), memory.data_ptr())
        self._attention_step(byref(layer), len(x), x.data_ptr(), q.data_ptr(), byref(past), *pointers)
        return y


@lru_cache
def _load() -> Kernels | OSError:
    try:
        return Kernels(build())
    except OSError as error:
        return error


def kernels() -> Kernels | None:
    """The kernels, compiled if need be; None where they cannot be, or `MMMAMBA_SSM=torch` keeps them out."""
    if os.environ.get(ENVIRONMENT) == "torch":
        return None
    found = _load()
    if isinstance(found, Kernels):
        return found
    logger.warning_once(
        "mmMamba is slower on this CPU than it could be: its kernels are missing, since %s. Setting %s=torch hides "
        "this warning.",
        found,
        ENVIRONMENT,
    )
    return None


def reason_without_kernels() -> str | None:
    """Why there are no kernels; None if there are."""
    if os.environ.get(ENVIRONMENT) == "torch":
        return f"{ENVIRONMENT}=torch keeps them out"
    found = _load()
    return None if isinstance(found, Kernels) else str(found)


def decode_step(*arguments) -> Tensor:
    """See `ssm_mmmamba.decode_step`."""
    if not is_ordinary(arguments[0]):
        return torch_decode_step(*arguments)
    return kernels().decode_step(*arguments)


CPU = TORCH._replace(name="cpu", decode_step=decode_step)
