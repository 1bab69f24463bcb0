import dataclasses
import re
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from mold import planned_step
from mold.commands.cli import dispatch, main
from mold.commands.inputs import lora_config, student_config
from mold.commands.parsing import parse
from mold.commands.plan import setup_of
from mold.method import chunked_mlp
from mold.plan import GIB, GPUS, SAVERS, Machine, Setup, inference_peak, largest_length, plan_step
from mold.training.adapters import add_adapter
from tests.tiny_models import make_model

RATES = {"float32": 1e12, "bfloat16": 2e12, "attention float32": 1e12, "attention bfloat16": 2e12}
MACHINE = Machine("a machine", RATES, 1e11, 8 * GIB, 0.5 * GIB)


def config(**options):
    return LlamaConfig(
        **{
            "vocab_size": 5000,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
        | options
    )


def test_weights_gradients_and_optimizer_are_those_of_the_model():
    student = make_model("llama", vocab=501, layers=2)
    planned = plan_step(student.config, Setup(32))
    size = sum(p.nbytes for p in student.parameters())
    buffers = sum(b.nbytes for b in student.buffers())
    assert (planned.parameters, planned.gradients, planned.optimizer) == (size // 4, size, 2 * size)
    assert planned.weights == size + buffers
    assert plan_step(student.config, Setup(32, optim="sgd")).optimizer == 0
    assert plan_step(student.config, Setup(32, optim="adamw_bnb_8bit")).optimizer == size // 2
    assert plan_step(student.config, Setup(32, dtype="bfloat16")).gradients == size // 2


def test_inference_holds_weights_and_cached_keys_and_values():
    def peaks(layers, cache):
        model = make_model("llama", vocab=64, layers=layers)
        return inference_peak(model.config, "float32", 2, 256, cache=cache), sum(p.nbytes for p in model.parameters())

    (few, few_weights), (many, many_weights) = peaks(6, False), peaks(9, False)
    assert few > few_weights
    assert many - few == many_weights - few_weights
    config = make_model("llama").config
    key_and_value = 2 * (2 * config.num_key_value_heads * 256 * config.head_dim) * 4
    assert (peaks(9, True)[0] - peaks(6, True)[0]) - (many - few) == 3 * key_and_value


def test_what_the_forward_keeps_is_what_autograd_saves():
    """Counted on a real forward: every storage that saved_tensors_hooks see, logits and losses beside."""
    student = make_model("llama", vocab=501, layers=2, attention="sdpa").train()
    ids = torch.arange(64)[None]
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits[torch.arange(63)], ids[0, 1:])
    parameters = {p.untyped_storage().data_ptr() for p in (*student.parameters(), *student.buffers())}
    kept = sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert loss > 0
    assert plan_step(student.config, Setup(64)).activations == pytest.approx(kept, rel=0.1)


def test_flops_are_six_a_parameter_and_token_and_the_attention():
    shape = config(tie_word_embeddings=True)
    planned = plan_step(shape, Setup(256))
    products = 6 * 256 * planned.parameters
    attention = 14 * 3 * 6 * 256**2 * 16 / 2
    assert planned.flops == pytest.approx(products + attention, rel=0.02)
    again = plan_step(shape, Setup(256, activation_checkpointing=True))
    # Without the MLPs' last products: checkpointing stops where nothing more is needed.
    layers = planned.parameters - 5000 * 96 - 3 * 256 * 96
    assert again.flops - planned.flops == pytest.approx(2 * 256 * layers + attention * 4 / 14, rel=0.01)


@pytest.mark.parametrize("saver", SAVERS)
def test_every_saver_saves(saver):
    length = 8192 if "mlp_chunk_size" in SAVERS[saver] else 512  # two of its chunks
    plain, saved = (plan_step(config(), Setup(length, **options)) for options in ({}, SAVERS[saver]))
    if saver == "bfloat16 autocast":
        assert saved.seconds(MACHINE) < plain.seconds(MACHINE)
    else:
        assert saved.peak(MACHINE) < plain.peak(MACHINE)


def test_eager_attention_grows_with_the_square_of_the_length():
    def maps(length):
        eager, pooled = (plan_step(config(), Setup(length, attention=a)) for a in ("eager", "mold"))
        return eager.activations - pooled.activations

    assert maps(1024) / maps(512) == pytest.approx(4, rel=0.1)


def test_the_backward_of_eager_attention_begins_with_a_gradient_of_every_layers_maps():
    setup = Setup(1024, attention="eager", per_device_train_batch_size=2)
    planned = plan_step(config(), setup)
    maps = config().num_hidden_layers * config().num_attention_heads * 2 * 1024**2 * 4
    assert planned.step >= planned.activations + 0.95 * maps


def test_accumulated_gradients_are_there_in_the_next_forward():
    one, four = (plan_step(config(), Setup(512, gradient_accumulation_steps=n)) for n in (1, 4))
    assert four.step == pytest.approx(one.step + one.gradients, rel=0.1)
    # Adding to the gradients that are there takes a little more; weights are updated once.
    update = (6 * one.gradients + 2 * one.optimizer) / MACHINE.bandwidth
    assert four.seconds(MACHINE) - update == pytest.approx(4 * (one.seconds(MACHINE) - update), rel=0.05)


def test_attention_has_a_rate_of_its_own():
    planned = plan_step(config(), Setup(2048))
    slow = dataclasses.replace(MACHINE, flops=RATES | {"attention float32": 1e11})
    attention = 14 * 3 * 6 * 2048**2 * 16 / 2
    assert planned.seconds(slow) - planned.seconds(MACHINE) == pytest.approx(attention * (1e-11 - 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mold", "eager"])
def test_the_largest_length_fits_and_little_more_does_not(attention):
    setup = Setup(256, attention=attention)
    length = largest_length(config(), setup, MACHINE, 1.5 * GIB)
    peaks = [
        plan_step(config(), dataclasses.replace(setup, length=t)).peak(MACHINE) for t in (length, int(1.04 * length))
    ]
    assert peaks[0] <= 1.5 * GIB < peaks[1]
    assert largest_length(config(), setup, MACHINE, 0.1 * GIB) == 0


@pytest.mark.slow
def test_the_command_names_the_best_saver_and_the_largest_length(tmp_path, capsys, monkeypatch):
    GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=5000).save_pretrained(tmp_path)
    options = ["--model_name_or_path", str(tmp_path), "--max_length", "256"]
    dispatch(["plan", *options, "--gpu", "l4", "--memory", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "fits 2.0 GiB of NVIDIA L4; the largest T that fits is" in said
    assert "buys most" in said
    monkeypatch.setattr(sys, "argv", ["mold", "plan", *options, "--gpu", "h1"])
    with pytest.raises(SystemExit):
        main()
    assert "gpu: is 'h1', must be one of a100-80gb" in capsys.readouterr().err


def plan_of(folder, *arguments):
    """What the command plans of these options, and its setup."""
    options = parse("plan", ["--model_name_or_path", str(folder), "--max_length", "256", *arguments])
    setup = setup_of(options)
    return plan_step(student_config(options), setup), setup


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config().save_pretrained(folder)
    return folder


def test_an_adapter_is_the_one_that_training_adds(saved):
    full, _ = plan_of(saved)
    planned, _ = plan_of(saved, "--use_peft", "true", "--lora_r", "3")
    student = AutoModelForCausalLM.from_config(config())
    arguments = ["--model_name_or_path", str(saved), "--use_peft", "true", "--lora_r", "3"]
    adapted = add_adapter(student, lora_config(parse("plan", arguments).student))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert planned.trainable == trained
    assert (planned.gradients, planned.optimizer) == (4 * trained, 8 * trained)
    assert planned.parameters == full.parameters
    attention_alone, _ = plan_of(
        saved, "--use_peft", "true", "--lora_r", "3", "--lora_target_modules", "q_proj", "v_proj"
    )
    assert attention_alone.trainable < planned.trainable
    assert attention_alone.activations < planned.activations


def test_four_bits_are_half_a_byte_and_scales_of_every_linear_layer_but_the_output(saved):
    lora = ("--use_peft", "true")
    full, packed = plan_of(saved, *lora)[0], plan_of(saved, *lora, "--load_in_4bit", "true")[0]
    student = AutoModelForCausalLM.from_config(config())
    linear = sum(
        layer.weight.numel()
        for layer in student.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not student.lm_head
    )
    assert full.weights - packed.weights == pytest.approx(linear * (4 - 0.5 - 4 / 64), rel=1e-3)
    assert (packed.parameters, packed.trainable) == (full.parameters, full.trainable)
    with pytest.raises(ValueError, match="load_in_4bit: is True, must be False without use_peft"):
        plan_of(saved, "--load_in_4bit", "true")


def test_gpt2_can_be_planned_in_four_bits(tmp_path):
    GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500).save_pretrained(tmp_path)
    options = ("--use_peft", "true", "--bf16", "true")
    packed, full = (plan_of(tmp_path, *options, "--load_in_4bit", value)[0] for value in ("true", "false"))
    assert packed.weights < full.weights


def test_two_tasks_are_twice_the_texts_without_pooled_attention(saved):
    two, setup = plan_of(saved, "--method", "step_by_step")
    assert (setup.texts, setup.trains_attention) == (16, False)
    same, _ = plan_of(saved, "--method", "rationales", "--per_device_train_batch_size", "16")
    assert plan_of(saved, "--method", "step_by_step", "--per_device_train_batch_size", "8")[0].step == same.step
    with_attention, _ = plan_of(saved, "--mol_two_tasks", "true")
    assert with_attention.flops == pytest.approx(two.flops, rel=1e-3)


def test_an_online_teacher_adds_its_weights_and_forward(saved, tmp_path):
    config(num_hidden_layers=5).save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_config(config(num_hidden_layers=5))
    alone, _ = plan_of(saved)
    options = ("--teacher_model_name_or_path", str(tmp_path), "--teacher_online", "true")
    taught, _ = plan_of(saved, *options)
    weights = sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))
    assert taught.weights - alone.weights == weights
    layers = sum(p.numel() for name, p in teacher.named_parameters() if ".layers." in name and p.ndim > 1)
    attention = 4 * 5 * 6 * 256**2 * 16 / 2
    assert taught.flops - alone.flops == pytest.approx((2 * 256 * layers + attention) * 8, rel=0.01)
    halves, _ = plan_of(saved, *options, "--teacher_dtype", "bfloat16")
    assert halves.weights - alone.weights < 0.51 * weights
    # With beta=0 it is there and is not asked.
    assert plan_of(saved, *options, "--beta", "0")[0].flops == plan_of(saved, "--beta", "0")[0].flops
    with pytest.raises(ValueError, match="teacher_model_name_or_path: is not given"):
        plan_of(saved, "--teacher_online", "true")


def test_pooled_attention_is_counted_with_the_teachers():
    """The forward has every layer's beside the teacher's, the backward begins with a gradient of every layer's."""
    setup = Setup(512, num_steps=400, num_key_words=500, activation_checkpointing=True, cross_entropy="chunked")
    none = plan_step(config(), dataclasses.replace(setup, trains_attention=False))
    maps = 400 * 500 * 4
    for change, layers in (({}, 3), ({"teacher_layers": 7}, 7), ({"signal_layers": "mixture"}, 1)):
        planned = plan_step(config(), dataclasses.replace(setup, **change))
        # The student's are gone when the loss is known: the gradient of their mixture is kept.
        assert planned.activations - none.activations == pytest.approx((layers + 1) * maps, rel=0.02)
        for phase in (1, 2):
            assert planned.phases[phase] - none.phases[phase] >= (layers + 3) * maps


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        ({}, (103, 256)),
        ({"step_unit": "paragraph"}, (26, 256)),
        ({"step_unit": "paragraph", "max_reasoning_steps": 20, "max_key_words": 99}, (20, 99)),
        ({"key_scope": "question"}, (103, 16)),
        ({"num_steps": 7, "num_key_words": 3, "key_scope": "question"}, (7, 3)),
    ],
)
def test_steps_and_key_words_of_a_long_text(options, spans):
    assert Setup(4096, **options).spans == spans


@pytest.mark.slow
def test_checkpoints_in_the_hosts_memory():
    """What is left on the device does not grow with the layers, and a layer's backward takes what it took."""

    def kept(layers, **options):
        setup = Setup(4096, activation_checkpointing=True, cross_entropy="chunked", trains_attention=False, **options)
        return plan_step(config(num_hidden_layers=layers), setup)

    here, there = ([kept(layers, offload=offload) for layers in (6, 9)] for offload in (False, True))
    assert here[1].activations - here[0].activations == 3 * 4096 * 96 * 4
    assert there[1].activations == there[0].activations
    assert there[1].flops == here[1].flops
    with pytest.raises(ValueError, match="offload: is True, must be False without activation_checkpointing"):
        Setup(8, offload=True)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")])
def test_two_chunks_of_an_mlp_stand_for_all(monkeypatch, adapter):
    options = {"activation_checkpointing": True, "cross_entropy": "chunked", "peft_config": adapter}
    setup = Setup(1000, per_device_train_batch_size=2, mlp_chunk_size=250, **options)
    planned = plan_step(config(), setup)
    monkeypatch.setattr(
        planned_step, "planned_chunks", lambda forward, *rest: chunked_mlp._in_chunks(*forward.args, forward, *rest)
    )
    real = plan_step(config(), setup)
    assert planned.phases == pytest.approx(real.phases, rel=0.05)
    # Recomputation stops at the last thing that is needed, before the last product.
    assert 1 <= planned.flops / real.flops < 1.03
    whole = plan_step(config(), dataclasses.replace(setup, mlp_chunk_size=None))
    assert planned.flops > whole.flops
    assert planned.phases[-1] < 0.8 * whole.phases[-1]


def test_nothing_grows_with_the_square_of_the_length():
    """Of a batch of texts without padding: no mask is made, whatever transformers makes of tensors without values."""

    def activations(length):
        setup = Setup(length, num_steps=2, num_key_words=2, activation_checkpointing=True, cross_entropy="chunked")
        return plan_step(config(), setup).activations

    assert activations(1 << 17) / activations(1 << 15) == pytest.approx(4, rel=0.01)


@pytest.mark.slow
def test_a_quarter_million_tokens_on_80_gb():
    """A student of 1B parameters with LoRA, on the mixture of a teacher of 32 layers, a paragraph a step."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    setup = Setup(
        1 << 18,
        dtype="bfloat16",
        activation_checkpointing=True,
        cross_entropy="chunked",
        peft_config=lora,
        teacher_layers=32,
        signal_layers="mixture",
        step_unit="paragraph",
    )
    gpu = GPUS["a100-80gb"]
    assert plan_step(llama, setup).peak(gpu) < gpu.memory
    assert (
        plan_step(llama, dataclasses.replace(setup, signal_layers="all", step_unit="sentence")).peak(gpu) > gpu.memory
    )


def test_packed_texts_attend_to_themselves_alone(saved):
    padded, packed = (plan_of(saved, "--padding_free", value)[0] for value in ("false", "true"))
    assert packed.flops == pytest.approx(padded.flops, rel=0.01)
    assert packed.step == pytest.approx(padded.step, rel=0.2)
    assert packed.step != padded.step


@pytest.mark.slow
def test_a_gpus_options_are_planned_without_one_and_its_times_are_not_measured(saved, capsys):
    dispatch(
        ["plan", "--model_name_or_path", str(saved), "--max_length", "256", "--gpu", "h100-80gb", "--bf16", "true"]
    )
    said = capsys.readouterr().out
    assert "s (not measured)" in said
    assert "bfloat16 autocast" not in said  # it is on
    assert "planning: LoRA of rank 16 ..." in said
    assert not re.search(r"saves? .*-?0\.00 +[0-9.]+ s$", said)


@pytest.mark.parametrize(
    ("arguments", "smaller"),
    [
        (("--gradient_checkpointing", "true"), "activations"),
        (("--cross_entropy", "chunked"), "activations"),
        (("--optim", "sgd"), "optimizer"),
        (("--model_dtype", "bfloat16"), "weights"),
    ],
)
def test_a_savers_option_reaches_the_plan(saved, arguments, smaller):
    assert getattr(plan_of(saved, *arguments)[0], smaller) < getattr(plan_of(saved)[0], smaller)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"length": 1}, "length: is 1, must be at least 2"),
        ({"optim": "lomo"}, "optim: is 'lomo', must be one whose memory is known"),
        ({"dtype": "float16"}, "dtype: is 'float16', must be one of float32, bfloat16"),
    ],
)
def test_options_that_cannot_be_planned_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Setup(**{"length": 8} | option)


def test_gpus_are_sane():
    for machine in GPUS.values():
        assert machine.flops["bfloat16"] > machine.flops["float32"] > machine.bandwidth > machine.memory
