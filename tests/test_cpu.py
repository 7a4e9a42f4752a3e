"""The CPU kernels against slow Python and fp64, compiled for each instruction set that this machine runs; building."""

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch.autograd import forward_ad

from mmmamba import backends_mmmamba, cpu_mmmamba
from mmmamba.backends_mmmamba import backend, find
from mmmamba.cache_mmmamba import CACHE
from mmmamba.cpu_mmmamba import CPU, Kernels, build, kernels, reason_without_kernels, usable_cores
from mmmamba.ssm_mmmamba import ENVIRONMENT, decode_step


X86 = platform.machine() in ("x86_64", "AMD64")
# AVX-512 with VNNI where there is one, AVX2, and what every such processor has.
OPTIONS = {"native": "", "avx2": " -mno-avx512f", "x86-64": " -march=x86-64"} if X86 else {"native": ""}
ROWS = (1, 2, 3, 5, 16, 17, 33)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="session", params=list(OPTIONS))
def compiled(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiler = os.environ.get("CC", "cc")
        if shutil.which(compiler.split()[0]) is None:
            pytest.skip(f"there is no C compiler named {compiler!r} to build the kernels with")
        monkeypatch.setenv("CC", compiler + OPTIONS[request.param])
        return Kernels(build())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- products of quantised weights -----------------------------------------------------------------------------------


def random_blocks(out_features, in_features, bits, generator):
    """Weights of any bytes, scales of either sign and of subnormal size."""
    tiles, groups = -(-out_features // 16), in_features // 32
    scales = torch.randn(tiles, groups, 16, generator=generator) * 0.1
    scales[..., 3] *= 1e-5
    integers = torch.randint(0, 256, (tiles, groups, bits * 64), dtype=torch.uint8, generator=generator)
    integers[0, 0, :8] = torch.tensor([0, 255] * 4)  # the ends of both formats
    return torch.cat([scales.half().view(torch.uint8), integers], dim=-1)


def unpacked(blocks, bits):
    """A weight (rows, in) in fp64, byte by byte as the format says."""
    tiles, groups, _ = blocks.shape
    weight = torch.zeros(tiles * 16, groups * 32, dtype=torch.float64)
    for tile in range(tiles):
        for group in range(groups):
            block = bytes(blocks[tile, group].tolist())
            scales, stored = struct.unpack("<16e", block[:32]), block[32:]
            for row in range(16):
                for column in range(32):
                    if bits == 4:
                        byte = stored[64 * (column // 8) + 4 * row + column % 4]
                        integer = (byte >> 4 if column % 8 >= 4 else byte & 15) - 8
                    else:
                        integer = stored[64 * (column // 4) + 4 * row + column % 4] - 128
                    weight[tile * 16 + row, group * 32 + column] = integer * scales[row]
    return weight


def inputs_of_known_rounding(rows, width, dtype, generator):
    """Inputs, and the integers from -127 to 127 and scales that they are rounded to: no input is halfway."""
    integers = torch.randint(-126, 127, (rows, width // 32, 32), generator=generator).double()
    integers[..., 5] = 127 * (1 - 2 * torch.randint(0, 2, integers.shape[:2], generator=generator))
    scales = 2.0 ** torch.randint(-9, 3, (rows, width // 32, 1), generator=generator).double()
    aside = 0.2 * (2 * torch.rand(integers.shape, generator=generator) - 1)
    aside[..., 5] = 0
    return ((integers + aside) * scales).flatten(1).to(dtype), integers, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_product_is_the_sum_of_integers_that_it_says(compiled, bits, dtype, generator):
    for out_features, width in ((37, 96), (64, 32)):
        blocks = random_blocks(out_features, width, bits, generator)
        weight = unpacked(blocks, bits)[:out_features]
        for rows in ROWS:
            x, integers, scales = inputs_of_known_rounding(rows, width, dtype, generator)
            rounded = (integers * scales).flatten(1)
            truth = rounded @ weight.T
            # fp32 sums, and the rounding of the result.
            tolerance = 1e-6 * (rounded.abs() @ weight.T.abs() + 1) + truth.abs() * torch.finfo(dtype).eps
            y = compiled.multiply(x, blocks, bits, out_features)
            assert y.dtype == dtype
            assert y.shape == (rows, out_features)
            assert ((y.double() - truth).abs() <= tolerance).all(), (rows, out_features)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_product_is_as_near_to_the_dequantised_one_as_rounded_inputs_can_be(compiled, bits, generator):
    blocks = random_blocks(50, 256, bits, generator)
    weight = unpacked(blocks, bits)[:50]
    x = torch.randn(7, 256, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    # Each input is at most half a step aside, a step being a 127th of its group's largest; evenly spread.
    step = x.double().view(7, 8, 32).abs().amax(-1) / 127
    weight = weight.view(50, 8, 32)
    error = compiled.multiply(x, blocks, bits, 50).double() - x.double() @ weight.flatten(1).T
    assert (error.abs() <= 1.0001 * step @ weight.abs().sum(-1).T / 2).all()
    variance = step.square() @ weight.square().sum(-1).T / 12
    assert 0.8 < (error.square() / variance).mean() < 1.2


@pytest.mark.parametrize("bits", [4, 8])
def test_nan_and_infinite_inputs_are_not_rounded_to_numbers(compiled, bits, generator):
    blocks = random_blocks(20, 64, bits, generator)
    x = torch.randn(6, 64, generator=generator)
    expected = compiled.multiply(x, blocks, bits, 20)
    for row, value in ((1, torch.nan), (2, torch.inf), (4, -torch.inf)):
        x[row, 40 - 7 * row] = value
    y = compiled.multiply(x, blocks, bits, 20)
    assert y[[1, 2, 4]].isnan().all()
    assert torch.equal(y[[0, 3, 5]], expected[[0, 3, 5]])
    tiny = torch.full((1, 64), 1e-38)
    assert torch.equal(compiled.multiply(torch.cat([0 * tiny, tiny]), blocks, bits, 20), torch.zeros(2, 20))


def test_products_that_are_none_are_refused(compiled):
    x, blocks = torch.randn(2, 64), torch.zeros(2, 2, 288, dtype=torch.uint8)
    assert compiled.multiply(x[:0], blocks, 4, 20).shape == (0, 20)
    for given in ((x, blocks, 8, 20), (x, blocks, 4, 33), (x[:, :32], blocks, 4, 20), (x, blocks.char(), 4, 20)):
        with pytest.raises(ValueError, match="expected uint8 blocks"):
            compiled.multiply(*given)
    for given in ((x.double(), blocks, 4, 20), (x.to("meta"), blocks, 4, 20), (x, blocks.to("meta"), 4, 20)):
        with pytest.raises(ValueError, match="the CPU kernels take inputs and biases in fp32 or bf16"):
            compiled.multiply(*given)
    with pytest.raises(ValueError, match=r"A bias has shape \(16,\), and 20 results are added to it"):
        compiled.multiply_dense(x, torch.zeros(20, 64), torch.zeros(16))
    with pytest.raises(
        ValueError, match=r"A product of \(2, 64\) inputs with a torch.float32 weight \(20, 32\) is none"
    ):
        compiled.multiply_dense(x, torch.zeros(20, 32))


# --- products of weights in fp32 and bf16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_products_are_exact(compiled, dtype, generator):
    for out_features, width in ((1, 1), (7, 15), (16, 32), (37, 40), (40, 100)):
        weight = torch.randn(out_features, width, generator=generator).to(dtype)
        bias = torch.randn(out_features, generator=generator).to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, width, generator=generator).to(dtype)
            product = x.double() @ weight.double().T
            for given, truth in ((bias, product + bias.double()), (None, product)):
                tolerance = 1e-6 * (x.double().abs() @ weight.double().abs().T + 1)
                tolerance += truth.abs() * torch.finfo(dtype).eps
                error = (compiled.multiply_dense(x, weight, given).double() - truth).abs()
                assert (error <= tolerance).all(), (rows, out_features, width)


def test_operands_need_not_be_contiguous(compiled, generator):
    x, weight = torch.randn(40, 3, generator=generator).T, torch.randn(40, 20, generator=generator).T
    bias = torch.randn(40, generator=generator)[::2]
    torch.testing.assert_close(compiled.multiply_dense(x, weight, bias), x @ weight.T + bias)
    blocks = random_blocks(20, 64, 4, generator)
    strided = torch.stack([blocks, blocks], dim=-1)[..., 0]
    x = torch.randn(64, 3, generator=generator).T
    assert torch.equal(compiled.multiply(x, strided, 4, 20), compiled.multiply(x.contiguous(), blocks, 4, 20))


# --- a step of the mixer ---------------------------------------------------------------------------------------------


def step_arguments(size, heads, kv_heads, taps, dtype, generator, batch=3):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    channels = (2 * kv_heads + heads) * size
    arguments = [draw(batch, channels + heads * size + heads), draw(channels, taps), draw(channels)]
    arguments += [draw(heads), draw(heads), 1 + draw(size, scale=0.3)]
    return arguments, [draw(batch, channels, taps - 1), draw(batch, heads, size, size).float()]


def relative_errors(values, truths):
    return [
        ((value.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()
        for value, truth in zip(values, truths, strict=True)
    ]


def compared_step(step, arguments, states):
    """Output and states after a step that may run on copies of the states, in a dtype of its own."""
    states = [state.clone() for state in states]
    return [step(*arguments, 1e-5, *states), *states]


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("size", [8, 24, 40, 64])
def test_a_step_equals_the_reference_in_fp64(compiled, size, heads, kv_heads, taps, generator):
    for dtype in DTYPES:
        arguments, states = step_arguments(size, heads, kv_heads, taps, dtype, generator)
        wide = [x.double() for x in arguments], [x.double() for x in states]
        truth = compared_step(decode_step, *wide)
        errors = relative_errors(compared_step(compiled.decode_step, arguments, states), truth)
        of_torch = relative_errors(compared_step(decode_step, arguments, states), truth)
        # In bf16 both round the same results, and torch every step on the way: with luck it is a little nearer.
        assert all(error <= 1.1 * other + 2e-6 for error, other in zip(errors, of_torch, strict=True)), (
            errors,
            of_torch,
        )


def test_states_in_any_layout_and_parameters_of_any_dtype_are_taken(compiled, monkeypatch, generator):
    monkeypatch.setattr(cpu_mmmamba, "kernels", lambda: compiled)
    arguments, (conv_state, state) = step_arguments(24, 4, 2, 4, torch.float32, generator)
    expected = compared_step(decode_step, arguments, (conv_state, state))
    strided = (
        conv_state.transpose(1, 2).contiguous().transpose(1, 2),
        state.transpose(2, 3).contiguous().transpose(2, 3),
    )
    assert not any(x.is_contiguous() for x in strided)
    conv_weight = torch.stack([arguments[1]] * 2, dim=-1)[..., 0]
    out = CPU.decode_step(arguments[0], conv_weight, *arguments[2:], 1e-5, *strided)
    for value, truth in zip((out, *strided), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)
    given = [arguments[0], *(x.double() for x in arguments[1:])]
    given[3] = torch.full((1,), 0.5, dtype=torch.bfloat16).expand(4)
    wide = [x.double() for x in given], [conv_state.double(), state.double()]
    value = compared_step(CPU.decode_step, given, (conv_state, state))
    torch.testing.assert_close(value[0].double(), compared_step(decode_step, *wide)[0], rtol=1e-4, atol=1e-5)


def test_steps_of_shapes_that_do_not_fit_are_refused(compiled, generator):
    arguments, states = step_arguments(8, 4, 2, 2, torch.float32, generator)
    for index in (0, 2, 3, 4, 5):
        wrong = [*arguments[:index], arguments[index][..., :-1], *arguments[index + 1 :]]
        with pytest.raises(ValueError, match="projections, parameters and states have shapes"):
            compiled.decode_step(*wrong, 1e-5, *states)
    with pytest.raises(ValueError, match="projections, parameters and states have shapes"):
        compiled.decode_step(*arguments, 1e-5, states[0][:2], states[1])


def test_extreme_inputs_of_a_step_give_what_torch_gives(compiled, generator):
    arguments, states = step_arguments(24, 2, 1, 2, torch.float32, generator, batch=5)
    channels = len(arguments[1])
    projected = arguments[0]
    projected[0, channels + 3] = -1e38  # of the gate: SiLU is 0
    projected[1, 5] = -1e30  # of the convolution
    projected[2, channels + 7] = torch.nan
    projected[3, -1] = 90  # of the step size
    projected[4, -2] = -90
    actual, expected = (compared_step(step, arguments, states) for step in (compiled.decode_step, decode_step))
    assert expected[0].isnan().sum() == 1
    for value, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, of make_dual
def test_transforms_of_functions_see_a_step(compiled, monkeypatch, generator):
    monkeypatch.setattr(cpu_mmmamba, "kernels", lambda: compiled)
    arguments, states = step_arguments(8, 2, 1, 2, torch.float32, generator)
    tangent = torch.randn(arguments[0].shape, generator=generator)

    def derivative(step):
        def out(projected):
            return step(projected, *arguments[1:], 1e-5, *(state.clone() for state in states))

        with torch.no_grad(), forward_ad.dual_level():
            carried = forward_ad.unpack_dual(out(forward_ad.make_dual(arguments[0], tangent))).tangent
        with torch.no_grad():
            return carried, torch.func.jvp(out, (arguments[0],), (tangent,))[1]

    for actual, expected in zip(derivative(CPU.decode_step), derivative(decode_step), strict=True):
        torch.testing.assert_close(actual, expected)


def test_one_thread_and_several_give_the_same_bits(compiled, generator):
    blocks, x = random_blocks(100, 96, 4, generator), torch.randn(3, 96, generator=generator)
    weight = torch.randn(300, 96, generator=generator)
    arguments, states = step_arguments(24, 6, 3, 2, torch.float32, generator)
    before, results = torch.get_num_threads(), []
    compiled.set_most_threads(3)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([
                compiled.multiply(x, blocks, 4, 100), compiled.multiply_dense(x, weight),
                *compared_step(compiled.decode_step, arguments, states),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
        compiled.set_most_threads(usable_cores())
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def forget(monkeypatch):
    """What the process knows of the kernels and of backends is found out anew, in this test and after it."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)

    def clear():
        cpu_mmmamba._load.cache_clear()
        backends_mmmamba._backend.cache_clear()

    clear()
    yield clear
    clear()


@pytest.mark.skipif(sys.platform != "linux", reason="says where libraries are")
def test_the_kernels_run_on_torchs_threads_whatever_else_brings_openmp():
    import sentencepiece  # noqa: F401  # which has a library of its own, mapped before that of torch here

    library, before = ctypes.CDLL(cpu_mmmamba._openmp_of_torch()), torch.get_num_threads()
    try:
        for count in (3, 5):
            torch.set_num_threads(count)
            assert library.omp_get_max_threads() == count
    finally:
        torch.set_num_threads(before)


def write_compiler(path, monkeypatch, does):
    """Makes `CC` a script."""
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """A compiler that copies what another has made, and counts how often."""
    try:
        library = build()
    except OSError as error:
        pytest.skip(str(error))
    log = tmp_path / "calls"
    copy = f'for last; do :; done\necho call >> {log}\nsleep 0.1\ncat {library} > "$last"'
    write_compiler(tmp_path / "copying-cc", monkeypatch, copy)
    monkeypatch.setattr(cpu_mmmamba, "_openmp_of_torch", lambda: None)  # one command compiles and links
    return lambda: len(log.read_text().split()) if log.exists() else 0


def failing(tmp_path, monkeypatch):
    write_compiler(
        tmp_path / "cc", monkeypatch, 'echo "kernels.c:3:10: fatal error: math.h: no such file" >&2; exit 1'
    )


def without_openmp(tmp_path, monkeypatch):
    write_compiler(tmp_path / "cc", monkeypatch, 'echo "/usr/bin/ld: cannot find -lgomp: no file" >&2; exit 1')


def hanging(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_mmmamba, "SECONDS_TO_COMPILE", 0.1)
    write_compiler(tmp_path / "cc", monkeypatch, "exec sleep 5")


def no_program(tmp_path, monkeypatch):
    write_compiler(tmp_path / "cc", monkeypatch, "")
    (tmp_path / "cc").write_bytes(b"\x7fELF nothing")


def wrong_product(tmp_path, monkeypatch):
    write_compiler(tmp_path / "cc", monkeypatch, 'for last; do :; done; echo nothing > "$last"')


REASONS = {
    "no-such-cc": "there is no C compiler named no-such-cc; install gcc or clang, or set CC",
    "  ": "there is no C compiler named ''; install gcc or clang, or set CC",
    failing: "cannot compile them with OpenMP: math.h: no such file",
    without_openmp: "cannot compile them with OpenMP: cannot find -lgomp: no file",
    hanging: "cc took more than 0.1 s",
    no_program: "cc cannot be run (Exec format error)",
    wrong_product: "file too short" if sys.platform == "linux" else "cannot compile them with OpenMP: ",
}


@pytest.mark.parametrize(("compiler", "reason"), REASONS.items())
def test_without_a_compiler_that_works_models_run_and_the_reason_is_said(
    compiler, reason, forget, monkeypatch, tmp_path
):
    model, ids, warnings = tiny_model("hybrid").float(), token_ids(5, seed=0)[None], []
    monkeypatch.setattr(cpu_mmmamba.logger, "warning_once", lambda text, *values: warnings.append(text % values))
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if callable(compiler):
            compiler(tmp_path, monkeypatch)
        else:
            monkeypatch.setenv("CC", compiler)
        forget()
        warnings.clear()
        assert kernels() is None
        said = reason_without_kernels()
        assert reason in said
        assert "\n" not in said
        (warning,) = warnings
        assert f"its kernels are missing, since {said}. Setting MMMAMBA_SSM=torch hides" in warning
        cache = model.new_cache()
        model(ids[:, :4], **{CACHE: cache})
        torch.testing.assert_close(model(ids[:, 4:], **{CACHE: cache}).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert backend(torch.device("cpu")).name == "torch"
    with pytest.raises(ValueError, match=r"^The cpu backend has no kernels: .*; use ssm_implementation='auto'\.$"):
        backend(torch.device("cpu"), requested="cpu")
    assert not [*tmp_path.glob("cache/*/*/*")]


def test_the_environment_keeps_kernels_out(forget, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "torch")
    monkeypatch.setattr(cpu_mmmamba, "build", lambda: pytest.fail("built for nothing"))
    assert kernels() is None
    assert reason_without_kernels() == "MMMAMBA_SSM=torch keeps them out"
    assert find("cpu") == (None, "has no kernels: MMMAMBA_SSM=torch keeps them out")
    assert backend(torch.device("cpu"), requested="cpu").name == "torch"


def test_kernels_are_compiled_once_for_each_compiler_and_processor(quick_compiler, monkeypatch, tmp_path):
    before = os.umask(0o002)  # of a user whose group has no other members, as many systems set it
    try:
        path = build(tmp_path / "cache")
        assert build(tmp_path / "cache") == path
    finally:
        os.umask(before)
    assert quick_compiler() == 1
    assert [*(tmp_path / "cache").iterdir()] == [path]
    assert path.stat().st_mode & 0o777 == (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert Kernels(path).multiply_dense(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3, 3]]
    monkeypatch.setattr(cpu_mmmamba, "_processor", lambda: "another")
    assert build(tmp_path / "cache") != path
    assert quick_compiler() == 2


def test_a_library_that_others_may_have_written_is_made_anew(quick_compiler, tmp_path):
    path = build(tmp_path / "cache")
    path.unlink()  # it is loaded
    path.write_bytes(b"theirs")
    path.chmod(0o722)
    assert build(tmp_path / "cache") == path
    assert path.read_bytes() != b"theirs"
    (tmp_path / "cache").chmod(0o777)
    elsewhere = build(tmp_path / "cache")
    assert tmp_path not in elsewhere.parents
    assert elsewhere.parent.stat().st_mode & 0o777 == 0o700
    assert quick_compiler() == 3


@pytest.mark.parametrize("cause", ["a file is there", "read-only", "no home"])
def test_a_cache_that_cannot_be_written_is_done_without(cause, quick_compiler, forget, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if cause == "a file is there":
        (tmp_path / "mmmamba").write_text("")
    elif cause == "no home":  # of a user id that the system does not know
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home directory")))
    else:
        mkdir = Path.mkdir
        refuse = OSError(30, "Read-only file system")
        monkeypatch.setattr(
            Path,
            "mkdir",
            lambda p, *a, **k: (_ for _ in ()).throw(refuse) if tmp_path in p.parents else mkdir(p, *a, **k),
        )
    assert reason_without_kernels() is None
    assert quick_compiler() == 1


@pytest.mark.parametrize("left", [b"", b"of another system"])
def test_a_cached_library_that_cannot_be_loaded_is_made_anew(left, quick_compiler, tmp_path):
    path = build(tmp_path / "cache")
    path.unlink()  # it is loaded
    path.write_bytes(left)
    path.chmod(0o700)
    assert build(tmp_path / "cache") == path
    Kernels(path)
    assert quick_compiler() == 2


def test_where_nothing_may_be_run_from_the_cache_another_folder_serves(quick_compiler, monkeypatch, tmp_path):
    load = ctypes.CDLL

    def mounted_noexec(name, *arguments, **options):
        if str(tmp_path) in str(name):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name, *arguments, **options)

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    path = build(tmp_path / "cache")
    assert tmp_path not in path.parents
    Kernels(path)
    assert not [*(tmp_path / "cache").iterdir()]


def test_a_full_cache_is_done_without(quick_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    path = build(tmp_path / "cache")
    assert tmp_path not in path.parents
    Kernels(path)
    assert not [*(tmp_path / "cache").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="says where libraries are")
def test_torchs_openmp_is_found_and_linked_in_a_folder_of_any_name(monkeypatch, tmp_path):
    openmp = Path(cpu_mmmamba._openmp_of_torch())
    assert openmp.is_file()
    folder = tmp_path / "my env, 2"
    maps = Path("/proc/self/maps").read_text().replace(str(openmp), str(folder / openmp.name))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda path, **options: maps)
        assert cpu_mmmamba._openmp_of_torch() == str(folder / openmp.name)
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler named cc to link it with")
    folder.mkdir()
    (folder / openmp.name).symlink_to(openmp)
    monkeypatch.setattr(cpu_mmmamba, "_openmp_of_torch", lambda: str(folder / openmp.name))
    source, library = tmp_path / "source.c", tmp_path / "library.so"
    source.write_text("int omp_get_max_threads(void);\nint threads(void) { return omp_get_max_threads(); }\n")
    with_torchs, _ = cpu_mmmamba._commands(["cc"], str(source), str(library))
    assert [cpu_mmmamba._run(command) for command in with_torchs] == [None, None]
    assert str(folder).encode() + b"\0" in library.read_bytes()  # where it is looked for


def test_two_that_compile_at_once_both_get_whole_kernels(quick_compiler, tmp_path):
    paths, barrier = [], threading.Barrier(2)

    def compile_too():
        barrier.wait()
        paths.append(build(tmp_path / "cache"))

    threads = [threading.Thread(target=compile_too) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quick_compiler() == 2
    assert len(set(paths)) == 1
    Kernels(paths[0])
    assert [*(tmp_path / "cache").iterdir()] == paths[:1]


def test_options_of_the_users_compiler_come_after_ours():
    for commands in cpu_mmmamba._commands(["ccache", "gcc", "-march=x86-64", "-O1"], "kernels.c", "kernels.so"):
        assert all(command[:2] == ["ccache", "gcc"] for command in commands)
        words = commands[0]
        assert words.index("-march=x86-64") > max(i for i, word in enumerate(words) if word.endswith("=native"))
        assert words.index("-O1") > words.index("-O3")
        assert all("-march=x86-64" in command for command in commands)  # sanitizers must be linked, too


def test_a_containers_quota_limits_the_threads(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (root / "a" / "cpu.max").write_text("150000 100000\n")
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert [*cpu_mmmamba._quotas(root, own)] == [(150000, 100000)]
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert [*cpu_mmmamba._quotas(root, own)] == [(150000, 100000), (-1, 100000)]
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_multiplies():
    """OpenMP in a child waits for threads that only its parent has."""
    if kernels() is None:
        pytest.skip(reason_without_kernels())
    script = (
        "import os, signal, torch\nfrom mmmamba.cpu_mmmamba import kernels\n"
        "torch.set_num_threads(2)\nx, weight = torch.randn(1, 64), torch.randn(96, 64)\n"
        "found = kernels()\nfound.set_most_threads(2)\nfound.multiply_dense(x, weight)\nchild = os.fork()\n"
        "if not child:\n    signal.alarm(60)\n    found.multiply_dense(x, weight)\n    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
