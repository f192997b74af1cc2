"""Arguments of vLLM's `LLM` (0.32, and older ones that scripts still pass) that Seesaw does not take.

`vllm_engine` maps those that mean something here.
"""

from __future__ import annotations

from seesaw.core.foreign import Foreign, refused, without_effect

_ONE = (1, 1.0)
_POOLING = "only text generation is served; keep vLLM for embeddings, scores and classes"
_QUANTISED = "quantised weights and KV are not supported; take a 16-bit checkpoint"
_OWN_CODE = "code of one's own does not run on the ranks; leave it out"
_CONFIG = "a model is what its config.json says; change that file"
_ONE_NODE = "one engine drives the ranks of one node; leave it out"

_REFUSED: dict[str, str] = {
    "code that comes with a checkpoint is never run; leave it out, the models that are supported need none": (
        "trust_remote_code"
    ),
    _QUANTISED: "quantization quantization_config allow_deprecated_quantization",
    "there are no LoRA adapters; merge the adapter into the weights first (peft: merge_and_unload)": (
        "enable_lora default_mm_loras"
    ),
    "there is no speculative decoding; leave it out, answers are distributed the same without": (
        "speculative_config speculative_model spec_method spec_model spec_tokens"
    ),
    _OWN_CODE: (
        "logits_processors scheduler_cls worker_extension_cls model_class_overrides io_processor_plugin "
        "reasoning_parser_plugin"
    ),
    _POOLING: "pooler_config override_pooler_config",
    _CONFIG: "hf_overrides hf_config_path rope_scaling rope_theta disable_sliding_window",
    "give the folder of the weights as the model": "model_weights",
    "prompts are text or token ids": "enable_prompt_embeds tokens_only",
    "only text goes into models here; keep vLLM for this model": "enable_mm_embeds mm_encoder_only",
    _ONE_NODE: (
        "data_parallel_rank data_parallel_start_rank data_parallel_hybrid_lb data_parallel_external_lb "
        "data_parallel_multi_port_external_lb"
    ),
    "answers are not watermarked; leave it out": "watermark_config",
    "models that generate by diffusion are not supported; keep vLLM for them": "diffusion_config",
    "weights do not change while an engine is up; make a new one": "weight_transfer_config",
    "this is for debugging vLLM; leave it out": "enable_trace_replay return_sampling_mask",
    "routed experts are not returned; leave it out": "enable_return_routed_experts",
}
"""Names by why they are refused."""

REFUSED: dict[str, Foreign] = {
    **{name: each for why, names in _REFUSED.items() for name, each in refused(why, *names.split()).items()},
    **refused(_QUANTISED, "kv_cache_dtype", neutral=("auto",)),
    **refused(_OWN_CODE, "worker_cls", neutral=("auto",)),
    **refused(_POOLING, "runner", "task", neutral=("auto", "generate")),
    **refused(_POOLING, "convert", neutral=("auto", "none")),
    **refused(_CONFIG, "config_format", neutral=("auto", "hf")),
    **refused(_ONE_NODE, "nnodes", neutral=_ONE),
    **refused(
        "only Hugging Face tokenisers are read", "tokenizer_mode", neutral=("auto", "hf", "slow", "fast")
    ),
    **refused(
        "log-probabilities are those of the model itself, before penalties and temperature; leave it out",
        "logprobs_mode",
        neutral=("raw_logprobs",),
    ),
    **refused(
        "a prompt is not split over ranks by its tokens; use tensor_parallel_size, or a plan",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        neutral=_ONE,
    ),
}
"""Ignoring one of these would give other answers, or none."""

_WITHOUT_EFFECT: dict[str, str] = {
    "CUDA graphs and compilation are no settings here": (
        "enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size "
        "max_seq_len_to_capture optimization_level performance_mode"
    ),
    "kernels are chosen by what the device can do": (
        "disable_custom_all_reduce attention_config attention_backend kernel_config moe_backend linear_backend "
        "sparse_indexer_topk_backend all2all_backend enable_flashinfer_autotune ir_op_priority "
        "disable_cascade_attn model_impl mamba_config mamba_backend mamba_ssu_algorithm mamba_cache_dtype "
        "mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_cache_philox_rounds "
        "enable_mamba_shared_prefix_checkpoint enable_mamba_cache_stochastic_rounding replayssm_buffer_len "
        "use_replayssm use_fp64_gumbel engram_config gdn_prefill_backend kda_prefill_backend kda_decode_backend "
        "use_v2_block_manager"
    ),
    "there is no prefix cache: every prompt is computed": (
        "enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval prefix_match_unit"
    ),
    "prefill and decode are phases of the plan; policy chooses how they take turns": (
        "enable_chunked_prefill max_num_partial_prefills max_long_partial_prefills num_scheduler_steps "
        "long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_scheduled_tokens "
        "max_num_active_seqs max_num_queued_reqs max_num_queued_tokens scheduler_reserve_full_isl "
        "prefill_schedule_interval async_scheduling preemption_mode enable_dbo ubatch_size "
        "dbo_decode_token_threshold dbo_prefill_token_threshold disable_chunked_mm_input"
    ),
    "ranks are processes of this node, which the engine starts": (
        "distributed_executor_backend master_addr master_port node_rank distributed_timeout_seconds "
        "cpu_distributed_timeout_seconds numa_bind numa_bind_nodes numa_bind_cpus device_ids "
        "data_parallel_size_local data_parallel_address data_parallel_rpc_port data_parallel_backend "
        "disable_nccl_for_dp_synchronization dp_sync_interval ray_workers_use_nsight worker_use_ray "
        "enable_nccl_comm_suspend _api_process_count _api_process_rank renderer_num_workers "
        "disable_async_output_proc fault_tolerance_config enable_fault_tolerance shutdown_timeout "
        "fail_on_environ_validation"
    ),
    "the plan says what each rank holds": (
        "enable_expert_parallel enable_eplb eplb_config expert_placement_strategy enable_ep_weight_filter "
        "enable_elastic_ep elastic_ep_max_dp_size enable_hc_sp enable_batch_sharded_sampling dcp_comm_backend "
        "dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size"
    ),
    "weights are mapped from safetensors files": (
        "max_parallel_loading_workers safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size model_loader_extra_config ignore_patterns use_tqdm_on_load "
        "pt_load_map_location code_revision hf_token"
    ),
    "LLM.stats() and LLM(trace=…) tell what an engine does": (
        "disable_log_stats disable_log_requests aggregate_engine_logging logging_config log_level log_config_file "
        "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
        "per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets "
        "cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details "
        "jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats profiler_config"
    ),
    "only text goes into models here": (
        "allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt "
        "interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type "
        "disable_mm_preprocessor_cache mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_tp_mode "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path "
        "mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc "
        "mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize ec_transfer_config ec_manager_config"
    ),
    "what it belongs to is not here": (
        "max_loras max_lora_rank fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules "
        "lora_extra_vocab_size enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format "
        "enable_moe_shared_loras max_lora_cls_labels structured_outputs_config guided_decoding_backend "
        "reasoning_parser reasoning_config aux_output_config additional_config num_lookahead_slots"
    ),
}
"""Names by why they have no effect."""

WITHOUT_EFFECT: dict[str, Foreign] = {
    **{
        name: each
        for why, names in _WITHOUT_EFFECT.items()
        for name, each in without_effect(why, *names.split()).items()
    },
    **without_effect(
        "device_memory and host_kv are the budgets, the plan divides them",
        *"kv_cache_memory_bytes num_gpu_blocks_override cpu_offload_gb cpu_offload_params offload_backend".split(),
        *"offload_group_size offload_num_in_group offload_prefetch_step offload_params kv_offloading_backend".split(),
        *"kv_transfer_config kv_events_config kv_cache_dtype_skip_layers enable_cumem_allocator".split(),
        *"enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names watermark".split(),
        *"disable_hybrid_kv_cache_manager kv_sharing_fast_prefill swa_bounded_replay enable_shm_tensor_arena".split(),
        neutral=(0, 0.0, "auto"),
    ),
    **without_effect("rows run in the order in which they come", "scheduling_policy", neutral=("fcfs",)),
    **without_effect("there is no server here", "served_model_name", "stream_interval", neutral=_ONE),
    **without_effect(
        "of a token, at most 20 log-probabilities can be asked for", "max_logprobs", neutral=range(21)
    ),
}
"""Answers are the same with and without these."""
