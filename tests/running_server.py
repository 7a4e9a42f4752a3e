"""A running server of each engine, and the model itself beside it, which says what the answers must be."""

import base64
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmmamba.examples.shapes.world import example


FOLDER = "examples/shapes/hybrid"
ROOT = Path(__file__).parents[1]
KEY = "a key for tests"
START = 600  # seconds, on a busy machine
LIMITS = {
    "--max-request-bytes": 4_000_000,
    "--max-image-bytes": 1_000_000,
    "--max-image-pixels": 1_000_000,
    "--max-request-pixels": 3_000_000,
}
# A prompt of more tokens than this is read in several steps.
BATCHED_TOKENS = 256
VLLM_OPTIONS = [
    *("--max-num-seqs", "16", "--max-num-batched-tokens", str(BATCHED_TOKENS)),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
]


@dataclass
class Server:
    """A running `mmmamba serve`."""

    engine: str
    process: subprocess.Popen
    log: Path
    url: str
    model: str = "hybrid"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=600)

    def chat(self, content, **options):
        """Asks one question, greedily unless told otherwise."""
        messages = content if isinstance(content, list) and "role" in content[0] else user(content)
        options = {"temperature": 0, "max_tokens": 32, **options}
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def answer(self, content, **options) -> str:
        return self.chat(content, **options).choices[0].message.content

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def start(
    engine: str, log: Path, *options: str, engine_options: list[str] | tuple = (), folder: str | Path = FOLDER
) -> Server:
    """Starts a server on a free port and waits until it answers."""
    command = [sys.executable, "-m", "mmmamba", "serve", str(folder), "--engine", engine, "--dtype", "float32"]
    command += ["--port", "0", "--api-key", KEY, *options, *(["--", *engine_options] if engine_options else [])]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    server = Server(engine, process, log, "", Path(folder).name)
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"ask (http://\S+)", log.read_text(errors="replace")):
            server.url = found[1]
            try:
                server.client.models.list()
                return server
            except openai.APIConnectionError:
                pass
        time.sleep(0.3)
    process.kill()
    pytest.fail(f"The server did not start:\n{log.read_text(errors='replace')[-8000:]}")


@dataclass
class Media:
    """Pictures and a video as files, and an HTTP server that has them."""

    folder: Path
    url: str


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def picture(index: int) -> Image.Image:
    """A held-out picture."""
    return example("test", 0, index)[1][0].draw()


def as_data(image: Image.Image, format: str = "PNG") -> str:
    """A picture as an address that has its content."""
    file = io.BytesIO()
    image.save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(*addresses: str, question: str) -> list[dict]:
    """The content of a message with pictures."""
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return [*parts, {"type": "text", "text": question}]


class Reference:
    """The model, in this process."""

    def __init__(self):
        self.processor = AutoProcessor.from_pretrained(ROOT / FOLDER, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(ROOT / FOLDER, trust_remote_code=True, dtype=torch.float32)
        self.model = model.eval()

    def encode(self, messages: list[dict]):
        """The inputs of a chat; its pictures are PIL images and its videos files."""
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def ids(self, inputs, max_new_tokens: int = 32) -> list[int]:
        """The greedy answer to inputs."""
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def answer(self, content, max_new_tokens: int = 32) -> str:
        """The greedy answer to one question, a text or a list of parts."""
        ids = self.ids(self.encode(user(content)), max_new_tokens)
        return self.processor.decode(ids, skip_special_tokens=True)

    def answer_about(self, *images: Image.Image, question: str) -> str:
        parts = [{"type": "image", "image": image} for image in images]
        return self.answer([*parts, {"type": "text", "text": question}])
