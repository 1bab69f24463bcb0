"""LoRA and its like through peft: the student's weights stay, an adapter and the router are trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from mold.extras import missing_extra


def add_adapter(model: PreTrainedModel, peft_config) -> PreTrainedModel:
    """The model with a fresh adapter; a model loaded in 4 or 8 bits (QLoRA) is prepared for training first.

    Args:
        model: the student.
        peft_config: a peft configuration, for example LoraConfig.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has an adapter already.
    """
    try:
        from peft import get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise missing_extra("peft_config", "peft", "peft") from error
    if without_adapter(model) is not model:
        raise ValueError("peft_config: is given for a model that has an adapter, must be None")
    if getattr(model, "is_quantized", False):
        # Checkpointing is switched on by Trainer, with its own options.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, peft_config)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def check_adapter(model: PreTrainedModel) -> None:
    """Raise a ValueError if the model's adapter or quantization would silently train something wrong.

    An adapter that puts tokens of its own before the text shifts the spans. bitsandbytes (0.50) lays 4-bit weights on
    CPUs out anew in evaluation, and from then on no gradient passes them.
    """
    if without_adapter(model) is not model and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config: is {type(model.active_peft_config).__name__}, must not put tokens before the text (LoRA "
            "and its like do not): steps and key words would be read at the wrong place"
        )
    if getattr(without_adapter(model), "is_quantized", False) and model.device.type == "cpu":
        raise ValueError(
            "model: is quantized and on a CPU, must be on a GPU to be trained: on CPUs bitsandbytes passes no gradient "
            "after an evaluation"
        )
