"""mmMamba in VLMEvalKit (github.com/open-compass/VLMEvalKit).

Copy this file to `vlmeval/vlm/mmmamba.py`, add one line to the end of `vlmeval/vlm/__init__.py` and one to the end of
`vlmeval/config.py`,

    from .mmmamba import MmMamba
    supported_VLM["mmMamba"] = partial(vlm.MmMamba, model_path="user/name-or-folder")

and run `python run.py --data MMBench_DEV_EN --model mmMamba`. Or leave VLMEvalKit as it is, put this file on the
Python path, and add one line to `run.py` after its imports:

    import vlmevalkit_mmmamba; vlmevalkit_mmmamba.register("mmMamba", model_path="user/name-or-folder")

The model's code is loaded with it from its folder or the Hub; the package mmmamba need not be installed.
"""

from functools import partial

import torch
from transformers import AutoModel, AutoProcessor
from vlmeval.vlm.base import BaseModel


class MmMamba(BaseModel):
    """A model folder of mmMamba: teacher, linear or hybrid.

    Args:
        model_path: Model folder, or its name on the Hub.
        device: Such as "cpu"; a GPU if there is one, if not given.
        options: Arguments of `generate`. The defaults answer greedily with up to 1024 tokens.

    Raises:
        ValueError: if the model reads text only.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ["text", "image"]  # noqa: RUF012

    def __init__(self, model_path: str, device: str | None = None, **options):
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Many CPUs have no instructions for half precision.
        dtype = torch.float32 if device == "cpu" else "auto"
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
        if getattr(self.processor, "image_processor", None) is None:
            raise ValueError(f"{model_path} reads text only; score it with lm-evaluation-harness instead.")
        self.model = AutoModel.from_pretrained(model_path, dtype=dtype, trust_remote_code=True).to(device).eval()
        self.options = {"max_new_tokens": 1024, "do_sample": False, **options}

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Answers one message.

        Args:
            message: Texts and pictures in order, `{"type": "text", "value": …}` and `{"type": "image", "value": …}`;
                a picture is a path, a URL or a PIL image.
            dataset: The benchmark; makes no difference.
        """
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Answers the last of several turns, each `{"role": "user" or "assistant", "content": as above}`."""
        turns = [
            {"role": turn["role"], "content": [_content_part(**part) for part in turn["content"]]} for turn in message
        ]
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **self.options)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(answer, skip_special_tokens=True).strip()


def _content_part(type: str, value, **_) -> dict:
    """A part of a message from VLMEvalKit's format to Transformers'."""
    return {"type": type, "text" if type == "text" else "image": value}


def register(name: str = "mmMamba", **arguments) -> None:
    """Makes `--model NAME` stand for `MmMamba(**arguments)`."""
    from vlmeval.config import supported_VLM  # slow: imports every model

    supported_VLM[name] = partial(MmMamba, **arguments)
