"""What becomes of every option of TrainingArguments and of TRL's SFTConfig: a table that tests hold whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transformers import TrainingArguments

_SPLIT = "the router stands beside the model: gradients of a model that is split cannot be clipped together with its"
_SUMS = "evaluation sums the losses here, and keeps no predictions"
_SCRIPT = "it is for scripts of one's own, and no trainer reads it"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FOLLOWED = _words(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha
    eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy
    save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last train_sampling_strategy
    """
)
"""What decides the weights and is done as transformers does it."""

NO_EFFECT = _words(
    """
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id prediction_loss_only save_on_each_node
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics
    fsdp_config liger_kernel_config do_eval local_rank
    """
)
"""What changes no loss: speed, places, logs, and what belongs to a refused option or is set by transformers itself."""

REFUSED = {
    "label_smoothing_factor": "the cross-entropy here is its own, without smoothing",
    "label_names": "what is learned stands in the regions of a text",
    "use_cache": "a forward that trains keeps no keys and values",
    "use_liger_kernel": 'untested with the attention here; liger-kernel\'s loss alone is cross_entropy="liger"',
    "auto_find_batch_size": "a step that ran out of memory leaves its gradient in the router",
    "bf16_full_eval": "evaluation is computed as training is",
    "fp16_full_eval": "evaluation is computed as training is",
    "eval_do_concat_batches": _SUMS,
    "eval_use_gather_object": _SUMS,
    "eval_accumulation_steps": _SUMS,
    "include_for_metrics": _SUMS,
    "batch_eval_metrics": _SUMS,
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "remove_unused_columns": "the spans and signals are no arguments of a model's forward",
    "length_column_name": "examples are not grouped by length",
    "parallelism_config": _SPLIT,
    "fsdp": _SPLIT,
    "deepspeed": _SPLIT,
    "do_train": _SCRIPT,
    "do_predict": _SCRIPT,
    "resume_from_checkpoint": "mold train finds it by itself, and MoldTrainer.train takes it",
}
"""What `MoldTrainer` cannot follow, and why: it must be as `MoldConfig` has it."""

SFT_FOLLOWED = _words(
    """
    model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path eos_token max_length
    pad_to_multiple_of completion_only_loss loss_type activation_offloading pad_token
    """
)
SFT_NO_EFFECT = _words(
    """
    dataset_num_proc packing_strategy
    """
)
_TEXT = "the text is the one that the signals were extracted from"
SFT_REFUSED = {
    "dataset_text_field": _TEXT,
    "dataset_kwargs": _TEXT,
    "shuffle_dataset": _TEXT,
    "truncation_mode": "a text is never cut: its steps would be lost",
    "packing": "spans count from a text's own first token",
    "eval_packing": "spans count from a text's own first token",
    "padding_free": "spans count from a text's own first token",
    "assistant_only_loss": "rationale and answer are learned",
} | {name: REFUSED[name] for name in ("auto_find_batch_size", "parallelism_config", "fsdp", "deepspeed")}
SFT_REFUSED["use_liger_kernel"] = "untested with the attention here"
"""Of SFTConfig, TrainingArguments among it, what `StepwiseAttentionMixin` cannot follow; the rest is SFTTrainer's."""

_REFUSED_VALUES = {
    ("train_sampling_strategy", "group_by_length"): (REFUSED, "lengths are not known to the sampler"),
    ("completion_only_loss", False): (SFT_REFUSED, "the loss on prompts is none of the method's"),
}


def check_followed(options: TrainingArguments, refused: Mapping[str, str]) -> None:
    """Refuse what a trainer cannot follow.

    Args:
        options: TrainingArguments, or what is derived from them.
        refused: REFUSED or SFT_REFUSED.

    Raises:
        ValueError: an option is not as it is by default; names it and says why it must be.
    """
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        default = None if option.default is dataclasses.MISSING else option.default
        if option.name in refused and value != default and not (default is None and value in ([], {}, "", False)):
            raise ValueError(f"{option.name}: is {value!r}, must be {default!r}: {refused[option.name]}")
        for (name, wrong), (where, reason) in _REFUSED_VALUES.items():
            if where is refused and name == option.name and value is not None and value == wrong:
                raise ValueError(f"{name}: is {getattr(value, 'value', value)!r}, must be another: {reason}")
