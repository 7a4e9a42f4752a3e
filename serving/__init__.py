"""mmMamba on servers: the vLLM plugin, and what `mmmamba serve` adds to a server."""


def register() -> None:
    """Makes the model known to vLLM, which calls this through the entry point `vllm.general_plugins`."""
    from vllm import ModelRegistry

    # By name, so that vLLM imports the model (and CUDA with it) only in the processes that need it.
    ModelRegistry.register_model(
        "MmMambaForConditionalGeneration", "mmmamba.serving.vllm_model:MmMambaForConditionalGeneration"
    )
