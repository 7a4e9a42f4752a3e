"""mmMamba on servers: the vLLM plugin, and what `mmmamba serve` adds to a server."""


def register() -> None:
    """Makes the model known to vLLM, which calls this through the entry point `vllm.general_plugins`."""
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
    from vllm import ModelRegistry

    from . import vllm_quantization, vllm_video  # noqa: F401  # the former registers itself

    # By name, so that vLLM imports the model (and CUDA with it) only in the processes that need it.
    ModelRegistry.register_model(
        "MmMambaForConditionalGeneration", "mmmamba.serving.vllm_model:MmMambaForConditionalGeneration"
    )
    # Where vLLM looks up which reader a model's videos need.
    VIDEO_PROCESSOR_MAPPING_NAMES.setdefault("mmmamba", vllm_video.MmMambaVideoProcessor.__name__)
