"""ZeRO partitions that can be rebuilt during training: the only folder that touches DeepSpeed's private names.

DeepSpeed fixes at construction which parameters it optimizes. To change them, the SAME optimizer object is taken down
to an empty shell and its class's own `__init__` is run on it again, through the engine's own construction path and with
the same inner optimizer (`rebuild.py`). So the LR scheduler, Accelerate's wrappers and user code stay bound to it, and
DeepSpeed's own code builds groups, flat buffers, partitions, hooks and buckets.

What each of W ranks holds, for A active elements:

- weights: stages 1 and 2 hold all of them whole; the parameters of one group are views of one flat buffer. Stage 3
  holds 1/W of each parameter (`ds_tensor`); those of all active parameters are views of one buffer.
- masters and moments: A/W elements each, flat, one partition a group; on the host under offload. Inactive blocks have
  none. `layout.py` says which elements of which parameters a partition has.

What a switch sends: nothing on stages 1 and 2, since every rank cuts its partition from weights it already holds. On
stage 3 DeepSpeed gathers each active parameter once to attach its hook (A elements in the model's dtype). Masters and
moments never travel: a group of the same parameters has the same partition on the same rank.

Every name of DeepSpeed's that is overridden, by `stages.override` alone: where and when, what DeepSpeed does, what
is done instead, and why it stays. A run is wrong without it; or its planned peak for a shipped recipe is at least 3%
higher (`lisa-dist plan` with the flags of the recipe's header); or on simulated GPUs
(tests/system/test_gpu_rehearsal.py, a tiny Llama) a step or a switch waits or copies more. All else is DeepSpeed's own.

initialize_optimizer_states: overrides.py, both classes, process-wide, without optimizer offload
    Makes a gradient of zeros for every master, and drops it. Instead masters of --lisa_offload go to the host, and
    those of fp32 weights are views of them. Wrong without: masters of --lisa_offload stay on the device.
    test_a_switch_holds_the_new_masters_beside_the_old_states_and_little_else
DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3: rebuild.py, their modules, during a switch
    The engine builds a new optimizer object. Instead `__init__` runs on the one that is there. Wrong without:
    schedulers are not bound to the new one. test_schedulers_stay_bound
initialize_ds_offload: rebuild.py, the optimizer, during a switch
    Attaches hooks to all modules. Instead those that are attached stay. Wrong without: checkpointing with frozen
    layers raises an error. test_a_plan_is_what_a_step_allocates
available_memory: overrides.py, the accelerator, process-wide, on CUDA
    Asks NVML, if pynvml is installed. Instead torch is asked. Wrong without: a ValueError where GPUs are named by
    their UUIDs, an error where there is no driver. test_a_switch_waits_for_nothing_else,
    test_a_pynvml_without_a_driver_is_not_asked
empty_cache: rebuild.py, the accelerator, during a switch
    Empties the allocator's cache once a group. Instead it stays. Counted: 7 waits a switch, in which copies of kept
    states cannot overlap the next step. test_a_switch_waits_for_nothing_else
defragment: rebuild.py, stage 3's module, during a switch
    Copies the partitions of all active parameters to the host and back, pageable. Instead they are copied on the
    device. Counted: 22 copies between host and device a switch. test_a_switch_copies_partitions_on_the_device
LinearFunctionForZeroStage3: stage3.py, process-wide, on stage 3
    Keeps the inputs of frozen weights for the backward pass. Instead those of trained weights are kept. Peak: 13.41
    GiB of 81.82 of llama2_70b_2nodes (16.4%). test_the_input_of_a_frozen_weight_is_not_kept
update_recompute_parameters: stage3.py, process-wide, on stage 3
    Partitions a recomputed layer again after its last matrix. Instead the layer stays gathered until its backward
    pass is done. Counted: 98 gathers a step in place of 74, where six layers of six are recomputed.
    test_a_recomputed_layer_stays_gathered_until_its_backward_pass_is_done
_PartitionedParameterCoordinator__params_to_release: stage3.py, process-wide, on stage 3
    Remembers what a place of another order let go of, and keeps layers that are gathered at once to the end of the
    step. Instead it is found by the order that there is. Wrong without: frozen layers that are not needed again stay
    whole. test_an_order_that_is_recorded_anew_is_not_followed_by_the_releases_of_the_old_one
scaled_global_norm, _get_norm_groups, has_overflow: gradients.py, without optimizer offload and model parallelism
    An all-reduce and a wait for each group, a copy in fp64 of each whole gradient, two more passes and waits to see
    whether it is finite. Instead one all-reduce and one wait. Peak: 3.31 GiB of 25.74 of llama3_8b_24gb (12.9%).
    Counted: on stage 2 10 waits a step in place of 3, of which 2 are the loop's own; on stage 3 7 all-reduces in
    place of 1, and each gradient copied in fp64. test_a_norm_taken_in_chunks_is_the_norm,
    test_a_step_waits_for_the_norm_alone
set_norm_for_param_grad_in_gpu, async_inplace_copy_grad_to_fp32_buffer_from_gpu: gradients.py, offload on stages 1, 2
    Copies each whole gradient in fp64 for its norm, and in fp32 to send it. Instead chunks of it. Peak: 0.72 GiB of
    18.23 of llama2_7b_1gpu (4.0%). test_a_norm_taken_in_chunks_is_the_norm
copy_grads_in_partition: gradients.py, stages 1 and 2 without optimizer offload
    Copies gradients to one buffer for all that will come. Instead each is kept by itself, as it arrives, and goes
    as its group steps. Peak: 3.59 GiB of 69.72 of llama2_70b_8gpus (5.1%). test_a_plan_is_what_a_step_allocates
average_tensor: gradients.py, stages 1 and 2 without optimizer offload
    With overlap_comm lets the memory of a gradient go that is larger than the bucket, while it is reduced. Instead
    it stays. Wrong without: on three ranks it is written over (docs/upstream/overlap_comm_race.md).
    test_a_loop_has_no_problem
reduce_independent_p_g_buckets_and_remove_grads: gradients.py, stages 1 and 2 on one rank, without optimizer offload
    Copies each gradient and divides it by 1. Instead it stays where it is. Counted: each gradient copied and divided
    in every step. test_a_gradient_of_one_rank_is_not_copied
overlap_comm: overrides.py, stages 1 and 2 on one rank, without optimizer offload
    Has a second bucket, and waits for the device at the end of the backward pass. Instead there is one bucket.
    Counted: one wait in every step. test_one_rank_has_one_bucket
get_all_grad_tensors, get_flat_partition, zero_grad: embedding_rows.py, LisaAdamW on stages 1 and 2, without offload
    Has the gradient of an embedding whole, on each rank. Instead the rows that occur, each at the ranks whose
    pieces it is in. Peak: 0.98 GiB of 23.41 of llama3_8b_24gb (4.2%). test_rows_train_as_whole_gradients_do
_get_preflattened_grad_partition, _prepare_fp32_grad_for_sub_group: step.py, LisaAdamW, --lisa_offload
    Flattens gradients on the device (stages 1, 2: step() does, where this returns None) and casts them to fp32.
    Instead LisaAdamW takes them as they are, and --lisa_offload sends them to the host. Wrong without: LisaAdamW is
    given no pieces, and masters on the host a gradient of the device.
    test_nothing_is_copied_before_or_behind_the_one_pass, test_blocks_with_their_states_on_the_host
unscale_and_clip_grads: step.py, LisaAdamW
    Multiplies the gradient that it is given. Instead the kernel has the factor. Wrong without: the loss scale and
    clipping have no effect. test_the_loss_scale_of_fp16_is_folded_in
_reassign_or_swap_out_partitioned_parameters, parallel_partitioned_bit16_groups: step.py, LisaAdamW, --lisa_offload
    Copies masters to the weights. Instead LisaAdamW's kernel has written them, and --lisa_offload sends them,
    pinned. Counted: under --lisa_offload 4 waits a step in place of 2; under LisaAdamW with fp32 masters each
    weight written twice. test_nothing_is_copied_before_or_behind_the_one_pass,
    test_a_step_on_the_host_waits_for_gradients_alone
jit_load: cpu_ops.py, process-wide
    Builds an op, and waits for a lock that a killed build has left. Instead one process builds at a time, says how
    long it takes, and removes such a lock. Wrong without: the next build waits without end.
    test_a_build_that_was_cut_is_taken_over
ds_opt_adam: cpu_ops.py, under optimizer offload
    Multiplies powers of the betas. Instead it is recorded how. Wrong without: a resume has other last bits.
    test_a_resumed_run_is_the_run_with

Also written, and not replaced: entries of the list of masters, and `params` of the inner optimizer's groups
(overrides.py), and `grad_position` while chunks are sent (gradients.py).

A release outside the supported range is refused when training starts, and so is one in which a listed name is missing
(`stages.check_private_names`). What a run is right without stays DeepSpeed's own where its name is in
`stages.left_out`, to compare with.
"""
