"""Runs whose gradients and optimiser are sharded over two CPU processes: all stages, stopped and resumed.

Accelerate takes FSDP and DeepSpeed on GPUs only and would run DDP instead, so it is told here that CPUs may.
"""

import importlib.util
import os
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from distill_runs import ACCUMULATION, make_teacher, quick_runs, results, same_weights, small_recipe, stop, weights
from forked import run_ranks

from mmmamba.conversion.distillation.run import distill


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "ACCELERATE_USE_CPU": "true",
}
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "DS_ACCELERATOR": "cpu",
}
OPTIONS = [*ACCUMULATION, *(f"stage_{n}.per_device_batch_size=1" for n in (1, 2, 3))]  # two micro-batches a process


@pytest.fixture(scope="module", autouse=True)
def without_delays():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """From a run's folder and overrides to a recipe."""
    return partial(small_recipe, make_teacher(tmp_path_factory.mktemp("teacher") / "tiny"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    distill(recipe(folder, *OPTIONS))
    return folder


def allow_cpus(environment):
    """As `accelerate launch` with such a configuration does, but for CPUs."""
    os.environ |= environment
    plain = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        if "ACCELERATE_USE_DEEPSPEED" in environment:
            kwargs["cpu"] = False  # with True, Accelerate leaves DeepSpeed out
        plain(self, *args, **kwargs)
        if "ACCELERATE_USE_FSDP" in environment and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if kwargs.get("fsdp_plugin") is not None:  # later calls give none and keep the first
                self.fsdp_plugin = kwargs["fsdp_plugin"]

    AcceleratorState.__init__ = init


def start(environment, recipe, stop_in_stage=None):
    """One start of a run, which may be stopped in the fourth step of a stage."""
    allow_cpus(environment)
    if stop_in_stage is not None:
        stop(recipe, step=3, stage=stop_in_stage)
        return
    distill(recipe)
    kind = AcceleratorState().distributed_type
    assert kind == (DistributedType.FSDP if "FSDP_VERSION" in environment else DistributedType.DEEPSPEED)


def refuse(environment, cut, message):
    allow_cpus(environment)
    with pytest.raises(ValueError, match=message):
        distill(cut)


DEEPSPEEDS_OWN = pytest.mark.filterwarnings("ignore:`torch.distributed.all_gather_into_tensor`:FutureWarning")


@pytest.mark.parametrize(
    "environment", [pytest.param(FSDP2, id="fsdp2"), pytest.param(ZERO2, id="zero2", marks=DEEPSPEEDS_OWN)]
)
def test_sharded_runs_resume_to_the_same_weights_as_those_of_one_process(environment, recipe, alone, tmp_path):
    if environment is ZERO2 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install deepspeed`, which builds it, is not for `make test`")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    starts = [(recipe(whole, *OPTIONS), None), *((recipe(cut, *OPTIONS), stage) for stage in (1, 3, None))]
    for number, one in enumerate(starts):
        (tmp_path / str(number)).mkdir()
        run_ranks(start, tmp_path / str(number), environment, *one)
    same_weights(cut, whole)
    for number in (1, 2, 3):
        one, two = (results(run)[f"stage_{number}"] for run in (alone, whole))
        assert one["tokens"] == two["tokens"] and one["trained"] == two["trained"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(whole)[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_process_then_fsdp_says_that_it_cannot_read_the_checkpoint(recipe, tmp_path):
    folder = tmp_path / "run"
    stop(recipe(folder, *OPTIONS, "stages=[1]"))
    message = (
        r"^[^\n]*checkpoint-2 was written under one process or DDP and this start is FSDP2 \(SHARDED_STATE_DICT\)"
    )
    run_ranks(refuse, tmp_path, FSDP2, recipe(folder, *OPTIONS, "stages=[1]"), message)


def refuse_without_gpus(environment, recipe):
    os.environ |= environment
    with pytest.raises(ValueError, match=r"^The launch asks for FSDP, which [^\n]*, but its device is cpu;"):
        distill(recipe)


def test_sharding_that_accelerate_would_leave_out_is_refused(recipe, tmp_path):
    run_ranks(refuse_without_gpus, tmp_path, FSDP2, recipe(tmp_path / "run", *OPTIONS, "stages=[1]"))
    assert not (tmp_path / "run" / "stage-1" / "model").exists()
