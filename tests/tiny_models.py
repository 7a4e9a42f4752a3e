"""Small random models of each kind."""

import torch

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


LAYER_TYPES = {
    "teacher": ["full_attention"] * 4,
    "linear": ["linear_attention"] * 4,
    "hybrid": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
IMAGE_TOKEN = 90
TILE_TOKENS = 4  # image tokens per tile


def token_ids(*parts, seed: int) -> torch.Tensor:
    """Random token ids (length,): each part is a number of text tokens, or "tile" for the image tokens of a tile."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        text = torch.randint(3, 80, (0 if part == "tile" else part,), generator=generator)
        ids += [IMAGE_TOKEN] * TILE_TOKENS if part == "tile" else text.tolist()
    return torch.tensor(ids)


def tiny_config(kind: str, image_token_id: int = IMAGE_TOKEN, pixel_shuffle_loc: str = "pre", **text) -> MmMambaConfig:
    text_config = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_embedding_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": LAYER_TYPES[kind],
        "ssm_chunk_size": 8,
        "initializer_range": 0.2,
    }
    vision_config = {"image_size": 16, "patch_size": 4, "use_pixel_shuffle": True, "initializer_range": 0.2}
    vision_config["pixel_shuffle_loc"] = pixel_shuffle_loc
    return MmMambaConfig(text_config=text_config | text, vision_config=vision_config, image_token_id=image_token_id)


def tiny_model(kind: str, **text) -> MmMambaForConditionalGeneration:
    """A random fp64 model; parameters with constant initial values are random, too, so that each has an effect."""
    torch.manual_seed(0)
    model = MmMambaForConditionalGeneration(tiny_config(kind, **text)).double().eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("mamba.conv1d", "mamba.A_log", "mamba.dt_bias", "norm")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def enable_checkpointing(model) -> None:
    """Enables gradient checkpointing by the name of the method in the installed Transformers version."""
    name = "activation_checkpointing_enable"  # since 5.23
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
