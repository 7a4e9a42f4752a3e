"""`mmmamba app`: a page in the browser where people show pictures, videos and documents to a model and ask it."""

import argparse
from importlib.util import find_spec

import torch

from mmmamba.conversion.publish import check_model_folder
from mmmamba.tokenization_mmmamba import load_tokenizer
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor

from .env import usable_device
from .load import load_model


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba app` until it is interrupted.

    Raises:
        ValueError: for a folder or a device that cannot be used.
        ImportError: if Gradio is missing.
        OSError: if nothing can listen at this address.
    """
    check_model_folder(args.model)
    device = usable_device(args.device)
    if find_spec("gradio") is None:
        raise ImportError("The page needs Gradio, which is not installed; run `pip install gradio`.")
    from mmmamba.app import build, launch

    # Many CPUs have no instructions for half precision.
    model = load_model(args.model, device, torch.float32 if device.type == "cpu" else "auto")
    tokenizer, video_processor = load_tokenizer(args.model), None
    if model.config.vision_config is not None:
        video_processor = MmMambaVideoProcessor.from_pretrained(args.model)
    page = build(model, tokenizer, video_processor, args.model.resolve().name)
    try:
        launch(page, server_name=args.host, server_port=args.port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise OSError(
            f"Nothing can listen at --host {args.host} --port {args.port} ({reason}); give another port."
        ) from None
    print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    try:
        page.block_thread()
    finally:
        page.sessions.close()
