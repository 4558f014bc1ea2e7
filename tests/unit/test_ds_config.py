"""DeepSpeed configs: every shipped one, what "auto" becomes, and what is refused."""

import json

import deepspeed
import pytest
import torch
from models import tiny_llama

from lisa_dist.ds_config import check_ds_config, find_ds_config, load_ds_config, read_ds_config, shipped_ds_configs

SHIPPED = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]


def test_the_shipped_configs_are_all_there():
    assert shipped_ds_configs() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepspeed_reads_every_shipped_config(name, dtype):
    filled = load_ds_config(name, model=tiny_llama().to(dtype), micro_batch_size=3, gradient_accumulation_steps=2)
    assert '"auto"' not in json.dumps(filled)
    config = deepspeed.DeepSpeedConfig(filled)
    assert config.zero_optimization_stage == int(name[4])
    assert config.train_micro_batch_size_per_gpu == 3
    assert config.gradient_accumulation_steps == 2
    assert config.bfloat16_config.enabled == (dtype == torch.bfloat16)
    assert config.zero_config.reduce_bucket_size == 64 * 64
    offload = config.zero_config.offload_optimizer
    assert (offload is not None) == (name.endswith(("offload", "nvme")))


def test_a_path_works_as_a_name_does(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert find_ds_config(str(path)) == str(path)
    assert read_ds_config(str(path)) == {"zero_optimization": {"stage": 1}}
    assert find_ds_config("zero2").endswith("zero2.json")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "zero3_nvme"])
def test_lisa_runs_under_the_shipped_configs(name):
    check_ds_config(read_ds_config(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_config_lacks_comes_from_the_arguments(dtype):
    filled = load_ds_config(
        {"zero_optimization": {"stage": 2}},
        model=tiny_llama().to(dtype),
        micro_batch_size=3,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
    )
    assert filled.pop("zero_optimization") == {"stage": 2}
    precision = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}
    assert filled == precision.get(dtype, {}) | {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
    }


def test_a_config_that_contradicts_the_arguments_is_refused():
    config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 4, but the arguments say 1"):
        load_ds_config(config, model=tiny_llama())


def test_an_unknown_name_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="--deepspeed zero9: neither a file nor a shipped config"):
        find_ds_config("zero9")
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_ds_config(str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_ds_config(str(path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "stage = 0"),
        ({"zero_optimization": {"stage": 0}}, "use stage 1"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, 'has an "optimizer" section'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "--deepspeed zero3_offload"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio = 0.5"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"bf16_master_weights_and_grads": True}},
            "remove it; --lisa_master bf16_sr with --optim lisa_adamw",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, '"zenflow" section'),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            "zero_quantized_nontrainable_weights = true: a switch lets weights train",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size = 2"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights = true"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients = true"),
        ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size = 2"),
        ({"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True}}, "expert_parallel.enabled = true"),
        ({"zero_optimization": {"stage": 2}, "sequence_parallel_size": 2}, "has sequence_parallel_size = 2"),
    ],
)
def test_what_lisa_cannot_run_under_is_refused(config, said):
    with pytest.raises(ValueError, match="the DeepSpeed config has") as error:
        check_ds_config(config)
    assert said in str(error.value)
