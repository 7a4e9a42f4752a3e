"""What a recipe costs: tokens and floating point operations per stage, computed from shapes.

A product of (n, a) and (a, b) counts 2·n·a·b operations; norms, activations and softmax are left out. A frozen weight
costs 2 operations per parameter and token forward and 2 backward; one that is trained 2 more.
"""

from dataclasses import dataclass

from mmmamba.configuration_mmmamba import MmMambaConfig

from .recipe import Recipe


H100 = 989e12  # dense bf16 operations per second


@dataclass(frozen=True)
class StageCost:
    """One stage, or `place` (measuring a placement): tokens read and operations done, over all steps."""

    stage: int | str
    tokens: float
    operations: float

    def gpu_hours(self, utilization: float, peak: float = H100) -> float:
        """Hours of one GPU that does `utilization` of its `peak` operations per second."""
        return self.operations / (peak * utilization) / 3600


def stage_costs(recipe: Recipe, config: MmMambaConfig, tokens: int) -> list[StageCost]:
    """The cost of each stage, and of measuring before stage 3 if the placement is measured.

    Args:
        recipe: Steps, batches and options.
        config: The teacher's.
        tokens: Tokens per conversation, those of images included.
    """
    text = config.text_config
    hidden, layers = text.hidden_size, text.num_hidden_layers
    query_width, key_width = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    mlp = 3 * hidden * text.intermediate_size
    head = hidden * text.vocab_size
    # Causal: a token attends to half of the others on average.
    attention = 2 * (hidden * (2 * query_width + 2 * key_width) + query_width * tokens)
    teacher = layers * (attention + 2 * mlp)
    in_proj = hidden * (2 * key_width + 2 * query_width + text.num_attention_heads)
    scan = 2 * query_width * text.ssm_chunk_size + 4 * query_width * text.head_dim

    costs = []
    measured = recipe.strategy == "measured"
    num_attention = recipe.num_attention or len(recipe.attention_layers or [])
    for number in recipe.stages:
        # A measured placement is known after stages 1 and 2, which train all layers.
        mamba_layers = layers if measured and number < 3 else layers - num_attention
        stage = recipe.stage(number)
        total_tokens = stage.steps * stage.batch_size * tokens
        if number < 3:
            # No gradient of a layer's input: in_proj forward and its weight's gradient, the scan thrice.
            per_token = teacher + mamba_layers * (4 * in_proj + 3 * scan)
            if number == 2 and stage.align == "output":  # forward, its weight's gradient and its input's
                per_token += mamba_layers * 3 * 2 * query_width * hidden
        else:
            if measured and number == 3:
                # The teacher and, once with each layer's replacement, the teacher again; both heads each time.
                placement_tokens = recipe.measure_batches * stage.batch_size * tokens
                per_token = (layers + 1) * teacher + layers * 2 * 2 * head
                costs.append(StageCost("place", placement_tokens, placement_tokens * per_token))
            mixer = 2 * (in_proj + query_width * hidden) + scan
            student = mamba_layers * mixer + (layers - mamba_layers) * attention + layers * 2 * mlp
            recomputed = student if stage.gradient_checkpointing else 0
            trained = mamba_layers * 2 * in_proj
            if stage.trainable != "mixers":
                trained += mamba_layers * 2 * query_width * hidden
            if stage.trainable == "decoder":
                trained += layers * 2 * mlp + (layers - mamba_layers) * 2 * hidden * (2 * query_width + 2 * key_width)
            # The student's head and layers forward and backward; the teacher's forward, if it runs.
            per_token = 2 * 2 * head + 2 * student + recomputed + trained
            if recipe.needs_teacher(number):
                per_token += teacher + 2 * head
        costs.append(StageCost(number, total_tokens, total_tokens * per_token))
    return costs


def cost_table(costs: list[StageCost], tokens: int, utilization: float = 0.4) -> str:
    """The costs as a table, and what they assume."""
    lines = ["stage  tokens (billions)  operations (10^18)  H100 hours"]
    total = StageCost(0, sum(c.tokens for c in costs), sum(c.operations for c in costs))
    for one in [*costs, total]:
        lines.append(
            f"{one.stage or 'all':>5}  {one.tokens / 1e9:17.2f}  {one.operations / 1e18:18.1f}  "
            f"{one.gpu_hours(utilization):10.0f}"
        )
    lines.append(
        f"Computed from shapes, not measured: conversations of {tokens:,} tokens, GPUs at {utilization:.0%} of "
        "989 TFLOP/s."
    )
    return "\n".join(lines)
