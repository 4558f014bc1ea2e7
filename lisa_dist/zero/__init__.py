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

Every name of DeepSpeed's that is overridden, by `overrides.override` alone, why, and the test that fails without:

========================================  ===================================  =====================================
name; when; file of the replacement       DeepSpeed does                       we do instead, and why; the test
========================================  ===================================  =====================================
initialize_optimizer_states               makes a gradient of zeros for every  moves masters of --lisa_offload to the
  both classes, process-wide, without     master, and drops it                 host, makes those of fp32 weights views
  optimizer offload: masters.py                                                of them, and makes no gradients: 4 bytes
                                                                               an active element less in a switch.
                                                                               test_a_switch_holds_the_new_masters
                                                                               _beside_the_old_states_and_little_else
DeepSpeedZeroOptimizer,                   builds a new optimizer object        runs `__init__` on the one that is
DeepSpeedZeroOptimizer_Stage3                                                  there: schedulers stay bound.
  their modules, during a switch:                                              test_schedulers_stay_bound
  rebuild.py
initialize_ds_offload                     attaches hooks to all modules        returns what is attached already:
  the optimizer, during a switch:                                              a second one breaks checkpointing with
  rebuild.py                                                                   frozen layers.
                                                                               test_frozen_embedding_with_checkpointing
available_memory                          asks NVML, which calls what torch    counts what torch has cached as free: a
  the accelerator, process-wide, on       has cached used                      switch copies nothing to the host and
  CUDA: overrides.py                                                           back to make room.
                                                                               test_a_switch_waits_for_nothing_else
empty_cache                               empties the allocator's cache once   nothing: each time the host would wait
  the accelerator, during a switch:       a group                              for the device and for copies of kept
  rebuild.py                                                                   states.
                                                                               test_a_switch_waits_for_nothing_else
defragment                                copies the partitions of all active  copies them on the device: the host
  stage 3's module, during a switch:      parameters to the host and back,     does not wait.
  stage3.py                               pageable                             test_a_switch_copies_partitions
                                                                               _on_the_device
LinearFunctionForZeroStage3               keeps the inputs of frozen weights   keeps those of trained weights: most
  process-wide, on stage 3: stage3.py     for the backward pass                activations of frozen layers go.
                                                                               test_a_plan_is_what_a_step_allocates
update_recompute_parameters               partitions a recomputed layer again  keeps the layer whole until its backward
  process-wide, on stage 3: stage3.py     after its last matrix                pass is done: one gather less a step.
                                                                               test_a_recomputed_layer_stays_gathered
                                                                               _until_its_backward_pass_is_done
scaled_global_norm, _get_norm_groups,     an all-reduce a group, a copy in     one all-reduce and one wait; on a GPU
has_overflow                              fp64 of each whole gradient, two     each gradient is read once, on CPU
  without optimizer offload and model     more passes and two more waits to    copied by chunks that a cache holds.
  parallelism: gradients.py               see whether it is finite             test_a_norm_taken_in_chunks_is_the_norm,
                                                                               test_a_step_waits_for_the_norm_alone
set_norm_for_param_grad_in_gpu,           copies each whole gradient in fp64   sends and measures chunks: up to
async_inplace_copy_grad_to_fp32           for its norm, and in fp32 to send    8 bytes an element of the largest
_buffer_from_gpu,                         it                                   gradient less.
_offload_grad_partition_at_boundary                                            test_a_norm_taken_in_chunks_is_the_norm
  under optimizer offload: gradients.py
copy_grads_in_partition                   copies gradients to one buffer for   keeps each by itself, as it arrives:
  stages 1, 2 without optimizer             all that will come                 no copy of the largest, and memory goes
  offload: gradients.py                                                        as groups step.
                                                                               test_a_plan_is_what_a_step_allocates
_record_gradient_stream                   protects gradients under optimizer   with overlap_comm as well: one that is
  stages 1, 2, without optimizer          offload alone                        larger than the bucket is not written
  offload: gradients.py                                                        over while it is reduced.
                                                                               test_a_loop_has_no_problem, 3 ranks
reduce_independent_p_g_buckets_and        copies each gradient and divides it  leaves it where it is, and waits for
_remove_grads, overlap_comm               by 1, and waits for that             nothing.
  stages 1, 2, on one rank, without                                            test_a_gradient_of_one_rank_is_not
  optimizer offload: gradients.py                                              _copied
get_all_grad_tensors,                     has the gradient of an embedding     LisaAdamW: has the rows that occur,
get_flat_partition, zero_grad             whole, on each rank                  each at the ranks whose pieces it is
                                                                               in.
  LisaAdamW on stages 1, 2, without
  offload: embedding_rows.py                                                   test_rows_train_as_whole_gradients_do
temp_grad_buffer_for_gpu_offload          allocates it at construction         allocates it when accumulation uses it.
  under optimizer offload, stages 1, 2:                                        test_a_plan_is_what_a_step_allocates
  gradients.py
_get_preflattened_grad_partition,         flattens gradients on the device     LisaAdamW: takes them as they are;
_prepare_fp32_grad_for_sub_group          (stages 1, 2: step() does, where     --lisa_offload: sends them to the host.
  LisaAdamW, --lisa_offload: step.py,     this returns None) and casts to      test_nothing_is_copied_before_or_behind
  host_step.py                            fp32                                 _the_one_pass,
                                                                               test_blocks_with_their_states_on_the_host
unscale_and_clip_grads                    multiplies the whole gradient        gives the kernel the factor.
  LisaAdamW: step.py                                                           test_the_loss_scale_of_fp16_is_folded_in
_reassign_or_swap_out_partitioned         copies masters to the weights        LisaAdamW's kernel has written them;
_parameters,                                                                   --lisa_offload: sends them, pinned.
parallel_partitioned_bit16_groups                                              test_nothing_is_copied_before_or_behind
  LisaAdamW, --lisa_offload: step.py,                                          _the_one_pass,
  host_step.py                                                                 test_a_step_on_the_host_waits_for
                                                                               _gradients_alone
OpBuilder.jit_load                        builds an op, and waits for a lock   lets one process build at a time, says
  process-wide: cpu_ops.py                that a killed build has left         how long it takes, and removes such a
                                                                               lock.
                                                                               test_a_build_that_was_cut_is_taken_over
ds_opt_adam                               multiplies powers of the betas       records how, for a resume to repeat
  optimizer offload: host_adam.py                                              it to the bit.
                                                                               test_a_resumed_run_is_the_run_with
========================================  ===================================  =====================================

Also written, and not replaced: entries of the list of masters, `params` of the inner optimizer's groups (masters.py),
and `grad_position` while chunks are sent (gradients.py).

A release outside the supported range is refused when training starts, and so is one in which a listed name is missing
(`stages.check_private_names`). `overrides.without(name)` leaves DeepSpeed's own norms and transfers in place.
"""
