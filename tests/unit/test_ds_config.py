"""DeepSpeed configs: every shipped one, what "auto" becomes, and what is refused."""

import contextlib
import json

import deepspeed
import pytest
import torch
from models import tiny_llama

from lisa_dist.ds_config import (
    check_ds_config,
    fill_layer_gathers,
    find_ds_config,
    load_ds_config,
    read_ds_config,
    shipped_ds_configs,
)

SHIPPED = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_nvme", "zero3_offload"]


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
    with pytest.raises(ValueError, match='"nvme"') if name == "zero3_nvme" else contextlib.nullcontext():
        check_ds_config(read_ds_config(name))


def test_a_path_works_as_a_name_does(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert find_ds_config(str(path)) == str(path)
    assert read_ds_config(str(path)) == {"zero_optimization": {"stage": 1}}
    assert find_ds_config("zero2").endswith("zero2.json")


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


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_file_is_named(tmp_path, text, said):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_ds_config(str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("zero", "others", "said"),
    [
        ({}, {}, "stage = 0"),
        ({"stage": 0}, {}, "use stage 1"),
        ({}, {"optimizer": {"type": "AdamW"}}, 'an "optimizer" section'),
        ({"offload_optimizer": {"device": "nvme"}}, {}, 'offload_optimizer.device = "nvme"'),
        ({"offload_param": {"device": "nvme"}}, {}, "--deepspeed zero3_offload"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "offload_optimizer.ratio = 0.5: LISA moves"),
        ({}, {"bf16": {"bf16_master_weights_and_grads": True}}, "remove it; --lisa_master bf16_sr with --optim lisa_"),
        ({"zenflow": {"topk_ratio": 0.1}}, {}, 'a "zenflow" section'),
        ({"zero_quantized_nontrainable_weights": True}, {}, "zero_quantized_nontrainable_weights = true: a switch le"),
        (
            {"stage": 2, "zero_hpz_partition_size": 2},
            {},
            "zero_hpz_partition_size = 2: weights are gathered on stage 3",
        ),
        (
            {"zero_hpz_partition_size": 2, "offload_param": {"device": "cpu"}},
            {},
            "size = 2: weights are gathered",
        ),
        ({"zero_quantized_weights": True}, {}, "zero_quantized_weights = true"),
        ({"zero_quantized_gradients": True}, {}, "zero_quantized_gradients = true"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size = 2"),
        ({}, {"expert_parallel": {"enabled": True}}, "expert_parallel.enabled = true"),
        ({}, {"sequence_parallel_size": 2}, "sequence_parallel_size = 2"),
    ],
)
def test_what_lisa_cannot_run_under_is_refused(zero, others, said):
    stage = {} if "stage" in said else {"stage": 3}
    with pytest.raises(ValueError, match="the DeepSpeed config has") as error:
        check_ds_config({"zero_optimization": stage | zero} | others)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("zero", "largest", "by_layers", "filled"),
    [
        ({"stage": 3}, 100, True, {"stage3_max_live_parameters": 200, "stage3_prefetch_bucket_size": 100}),
        ({"stage": 3, "stage3_prefetch_bucket_size": "auto"}, 100, True, {"stage3_prefetch_bucket_size": 100}),
        ({"stage": 3, "stage3_prefetch_bucket_size": 3686}, 100, True, {"stage3_prefetch_bucket_size": 100}),
        ({"stage": 3, "stage3_prefetch_bucket_size": 7}, 100, True, {"stage3_prefetch_bucket_size": 7}),
        ({"stage": 3, "stage3_max_live_parameters": 200}, 100, True, {"stage3_max_live_parameters": 200}),
        ({"stage": 3, "stage3_max_live_parameters": "auto"}, 100, True, {"stage3_max_live_parameters": 200}),
        ({"stage": 3, "stage3_max_live_parameters": 199}, 100, False, {"stage3_max_live_parameters": 199}),
        ({"stage": 3}, 1_000_000_001, False, {}),
        ({"stage": 3}, None, False, {}),
        ({"stage": 2}, 100, False, {}),
    ],
)
def test_a_layer_is_gathered_at_once_where_two_fit(zero, largest, by_layers, filled):
    config = {"zero_optimization": zero}
    assert fill_layer_gathers(config, largest, hidden_size=64) == by_layers
    assert config["zero_optimization"].items() >= filled.items()
