"""What a recipe needs of a GPU's memory and of the disk, counted on models without data (`meta` tensors).

Activations are left out, and what comes with them: the bf16 copies of weights that autocast makes, and memory that the
allocator holds back.
"""

import copy
from dataclasses import dataclass

import torch

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import expected_specs
from mmmamba.conversion.seeding import attention_layers, seeded_config
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration

from .recipe import Recipe
from .stages import make_distiller


FP32 = 4  # bytes
KEPT_CHECKPOINTS = 2  # of a stage, while a third is being written


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage.

    Args:
        stage: Its number.
        teacher: The teacher's weights, on every GPU; 0 where it does not run.
        student: fp32 weights of what the stage trains and of what stands around it.
        gradients: fp32 gradients.
        optimizer: AdamW's two moments, fp32.
        checkpoint: One checkpoint on the disk: weights and AdamW's moments.
        model: The stage's model folder.
    """

    stage: int
    teacher: int
    student: int
    gradients: int
    optimizer: int
    checkpoint: int
    model: int

    @property
    def one_gpu(self) -> int:
        """Bytes on the GPU of a launch with one process, without activations."""
        return self.teacher + self.student + self.gradients + self.optimizer

    @property
    def ddp(self) -> int:
        """The same on each of several GPUs: DDP sends gradients from buckets, a second copy of them."""
        return self.one_gpu + self.gradients

    def zero2(self, gpus: int) -> float:
        """The same where GPUs share gradients and AdamW's moments."""
        return self.teacher + self.student + (self.gradients + self.optimizer) / gpus


def stage_memory(recipe: Recipe, config: MmMambaConfig) -> list[StageMemory]:
    """The memory of each stage.

    Args:
        recipe: Stages, dtypes and the attention layers.
        config: The teacher's.
    """
    config = _teacher_config(config)
    with torch.device("meta"):
        teacher = MmMambaForConditionalGeneration(config).to(getattr(torch, recipe.teacher_dtype))
    teacher_bytes = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    found = []
    for number in recipe.stages:
        with torch.device("meta"):
            student_config = seeded_config(config, _attention(recipe, number, config))
            student = MmMambaForConditionalGeneration(student_config).float()
        distiller = make_distiller(recipe, number, teacher, student)
        weights = FP32 * sum(parameter.numel() for parameter in distiller.parameters())
        trained = FP32 * sum(parameter.numel() for parameter in distiller.parameters() if parameter.requires_grad)
        found.append(
            StageMemory(
                stage=number,
                teacher=teacher_bytes if recipe.needs_teacher(number) else 0,
                student=weights,
                gradients=trained,
                optimizer=2 * trained,
                checkpoint=weights + 2 * trained,
                model=_file_size(student_config, torch.float32),
            )
        )
    return found


def disk(recipe: Recipe, config: MmMambaConfig) -> tuple[int, int]:
    """Bytes of a run's folder: of the model folders that stay, and the most that it holds during the run."""
    stages = stage_memory(recipe, config)
    config = _teacher_config(config)
    seeded, final = (seeded_config(config, _attention(recipe, number, config)) for number in (1, 3))
    kept = most = _file_size(seeded, config.dtype or torch.float32)
    for one in stages:
        if one.stage == 3 and recipe.strategy == "measured":
            kept += _file_size(final, torch.float32)  # placed/
        most = max(most, kept + (KEPT_CHECKPOINTS + 1) * one.checkpoint)
        kept += one.model
    kept += _file_size(final, getattr(torch, recipe.dtype))
    return kept, max(most, kept)


def memory_table(recipe: Recipe, config: MmMambaConfig) -> str:
    """Memory and disk as a table, and what it leaves out."""
    lines = ["GiB    teacher  student  gradients   AdamW  one GPU  8 by DDP  8 by ZeRO-2  checkpoint"]
    for one in stage_memory(recipe, config):
        values = (one.teacher, one.student, one.gradients, one.optimizer, one.one_gpu, one.ddp, one.zero2(8))
        widths = (9, 9, 11, 8, 9, 10, 13, 12)
        cells = zip((*values, one.checkpoint), widths, strict=True)
        lines.append(f"{one.stage:>5}" + "".join(f"{value / 2**30:{width}.1f}" for value, width in cells))
    kept, most = disk(recipe, config)
    lines.append(
        "Computed from shapes, on each GPU, without activations. On the disk the run's folder grows to "
        f"{most / 2**30:.0f} GiB and ends with {kept / 2**30:.0f} GiB."
    )
    return "\n".join(lines)


def _teacher_config(config: MmMambaConfig) -> MmMambaConfig:
    """With attention in all layers, as the cost in operations is computed: `mmmamba:.` is a student's."""
    config = copy.deepcopy(config)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    return config


def _file_size(config: MmMambaConfig, dtype: torch.dtype) -> int:
    return sum(tensor.numel() for tensor in expected_specs(config).values()) * dtype.itemsize


def _attention(recipe: Recipe, number: int, config: MmMambaConfig) -> list[int]:
    """The layers that attend in a stage; of a measured placement, the first ones, as all cost the same."""
    layers = config.text_config.num_hidden_layers
    if recipe.strategy is None:
        return sorted(recipe.attention_layers or [])
    if recipe.strategy == "measured":
        return [] if number < 3 else list(range(recipe.num_attention))
    return attention_layers(layers, recipe.num_attention, recipe.strategy)
