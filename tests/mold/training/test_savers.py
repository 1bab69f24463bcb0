"""Memory savers, alone and together: training equals training without them, in every family."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file

from mold.data.encoding import learned_places
from mold.data.examples import PROMPT
from mold.method.loss import region_cross_entropy
from mold.training import chunked_cross_entropy as chunked_module
from mold.training.chunked_cross_entropy import chunked_cross_entropy
from mold.training.heads import ChunkedHead, make_head
from tests.tiny_models import FAMILIES, make_model
from tests.tiny_runs import BARE, EXAMPLES, make_student, make_trainer, metrics, weights

SAVERS = {
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "chunked": {"cross_entropy": "chunked"},
    "padding_free": {"padding_free": True},
    "chunked MLPs": {"mlp_chunk_size": 50},
}
SAVERS["together"] = {name: value for options in SAVERS.values() for name, value in options.items()}
PLAIN = ("llama", "gemma2", "gpt2")
"""The families that train with each saver alone: a plain one, soft-capped logits and windows, learned places."""
ALWAYS = ("padding_free", "together")
BF16 = {"bf16": True, "use_cpu": not torch.accelerator.is_available()}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK_ELEMENTS", 400 * 7)


def train(folder, signals, family="llama", peft_config=None, dtype=torch.float64, **options):
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-2} | options
    torch.manual_seed(5)
    trainer = make_trainer(
        folder,
        signals,
        make_student(family, layers=2, dtype=dtype),
        [BARE, *EXAMPLES[:7]],
        eval_examples=None,
        trainer_options={"peft_config": copy.deepcopy(peft_config)},
        **options,
    )
    if dtype == torch.float64:
        trainer.mold_loss.double()
    with torch.no_grad():  # a router that tells the layers apart from the first step on
        torch.nn.init.normal_(trainer.mold_loss.router.projection.weight, std=2.0)
    trainer.train()
    return trainer


def assert_same(actual, expected):
    # The norms of Gemma round to float32 in a float64 model, too, and which way depends on the last bit.
    tolerance = 1e-7 if actual.model.config.model_type.startswith("gemma") else 1e-10
    expected = weights(expected)
    for name, value in weights(actual).items():
        error = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, signals):
    """Training without any saver, once a family, with LoRA and without."""
    done = {}

    def get(family, peft_config=None):
        key = family, peft_config is not None
        if key not in done:
            done[key] = train(tmp_path_factory.mktemp(family), signals, family, peft_config)
        return done[key]

    return get


def savers_of(family, name):
    """Without the one that experts refuse (test_chunked_mlp.py)."""
    return {n: value for n, value in SAVERS[name].items() if (family, n) != ("gpt_oss", "mlp_chunk_size")}


# Together in every family; there a step's rows come one at a time, so in every family too several that are not padded.
@pytest.mark.parametrize(
    ("family", "saver"),
    [(family, saver) for family in FAMILIES for saver in SAVERS if saver in ALWAYS or family in PLAIN],
)
def test_training_equals_plain_training(tmp_path, signals, plain, family, saver):
    trainer = train(tmp_path, signals, family, **savers_of(family, saver))
    assert_same(trainer, plain(family))
    assert [row["loss_attention"] > 0 for row in metrics(tmp_path)] == [True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_every_saver_equals_lora(tmp_path, signals, plain, family):
    expected = plain(family, LORA)
    trainer = train(tmp_path, signals, family, LORA, **savers_of(family, "together"))
    assert_same(trainer, expected)
    fresh = make_student(family, layers=2, dtype=torch.float64).state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, fresh[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_follows_float32(tmp_path, signals, family):
    """Autocast rounds to 8 bits: losses agree to that, the router stays float32, savers change it no further."""
    rows = {}
    for name, options in (("plain", {}), ("bf16", BF16), ("savers", BF16 | SAVERS["together"])):
        trainer = train(tmp_path / name, signals, family, dtype=torch.float32, max_steps=3, **options)
        rows[name] = metrics(tmp_path / name)
        assert {p.dtype for p in trainer.mold_loss.parameters()} == {torch.float32}
    for term in ("loss_rationale", "loss_answer", "loss_attention"):
        for name in ("bf16", "savers"):
            actual, expected = ([row[term] for row in rows[kind]] for kind in (name, "plain"))
            assert actual == pytest.approx(expected, rel=2e-2), f"{name} {term}"
            assert actual != expected


@pytest.mark.parametrize("options", [{}, {"cross_entropy": "chunked"}], ids=["full", "chunked"])
def test_what_is_measured_before_training_takes_what_a_step_takes(tmp_path, signals, monkeypatch, options):
    """Gradient norms and beta="auto" run before transformers has switched on checkpointing, and before accelerate's
    autocast: they must keep no more than a step."""
    kept = []

    def pack(tensor):
        kept[-1][tensor.dtype] += tensor.numel() if tensor.numel() > 1 else 0
        return tensor

    def counting(*args, **kwargs):
        kept.append(collections.Counter())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return term_sums(*args, **kwargs)

    options = (
        options | BF16 | SAVERS["checkpointing"] | {"beta": "auto", "max_steps": 1, "per_device_train_batch_size": 4}
    )
    trainer = make_trainer(tmp_path, signals, make_student(layers=2, dtype=torch.float32), EXAMPLES[:4], **options)
    term_sums = trainer._term_sums
    monkeypatch.setattr(trainer, "_term_sums", counting)
    trainer.term_gradient_norms(trainer.train_dataset[:4])
    trainer.train()
    *before, step = kept
    assert len(before) == 5  # a term each, and both sides of beta
    assert before == [step] * 5
    assert step[torch.bfloat16]


def test_the_head_of_a_step_is_autocast_too(tmp_path, signals, monkeypatch):
    dtypes = set()
    forward = chunked_module.ChunkedCrossEntropy.forward

    def seen(ctx, hidden, weight, *args):
        dtypes.update((hidden.dtype, weight.dtype))
        return forward(ctx, hidden, weight, *args)

    monkeypatch.setattr(chunked_module.ChunkedCrossEntropy, "forward", seen)
    train(tmp_path, signals, dtype=torch.float32, cross_entropy="chunked", **BF16)
    assert dtypes == {torch.bfloat16}


# Cross-entropy in chunks


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_cross_entropy(generator, softcap, with_bias):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = draw(11, 6), draw(23, 6), draw(23) if with_bias else None
    targets = torch.randint(23, (11,), generator=generator)
    chosen = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    scale = torch.rand(11, generator=generator, dtype=torch.float64)
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected_gradients = torch.autograd.grad((expected * scale).sum(), chosen)
    for chunk_size in (1, 4, 11, 50):
        actual = chunked_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap, chunk_size=chunk_size)
        torch.testing.assert_close(actual, expected)
        for mine, theirs in zip(torch.autograd.grad((actual * scale).sum(), chosen), expected_gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_chunks_are_summed_in_float32(generator):
    """512 chunks of one bfloat16 token: summed in bfloat16, the gradient of the weight would stop growing."""
    hidden = torch.rand(512, 8, generator=generator).bfloat16()
    weight = torch.randn(5, 8, generator=generator).bfloat16()
    targets = torch.randint(5, (512,), generator=generator)
    gradients = []
    for dtype, chunk_size in ((torch.bfloat16, 1), (torch.float64, 512)):
        w = weight.to(dtype, copy=True).requires_grad_()
        losses = chunked_cross_entropy(hidden.to(dtype), w, targets, chunk_size=chunk_size)
        gradients.append(torch.autograd.grad(losses.sum(), w)[0].double())
    assert losses.dtype == torch.float64
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 2**-8


def test_nothing_made_is_as_large_as_the_logits(generator):
    """tokens x vocabulary is stored by no operation of forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    model = make_model("llama", vocab=5000)
    head = ChunkedHead(model)
    ids = torch.randint(5000, (2, 40), generator=generator)
    regions = torch.ones_like(ids)
    learned = head.learned(learned_places(regions))
    with Watch():
        outputs = model(input_ids=ids, use_cache=False, **head.arguments(learned))
        head.cross_entropy(outputs, ids, regions, learned).sum().backward()
    assert model.lm_head.weight.numel() <= largest < 79 * 5000 * 0.99


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("family", "kind"), [("llama", "full"), ("llama", "chunked"), ("gemma2", "chunked")])
def test_every_head_gives_the_cross_entropy_of_all_logits(generator, family, kind, training):
    model = make_model(family).train(training)
    ids = torch.randint(model.config.vocab_size, (3, 17), generator=generator)
    regions = torch.randint(3, (3, 17), generator=generator)
    regions[:, 9] = PROMPT  # a position that nobody learns from
    head = make_head(model, kind)
    learned = head.learned(learned_places(regions))
    outputs = model(input_ids=ids, use_cache=False, **head.arguments(learned))
    expected = region_cross_entropy(model(input_ids=ids).logits, ids, regions)
    torch.testing.assert_close(head.cross_entropy(outputs, ids, regions, learned), expected)
    made = {"full": int((regions[:, 1:] > PROMPT).any(0).sum()) if training else 17, "chunked": 1}
    assert outputs.logits.shape[1] == made[kind]


def test_logits_that_are_not_the_output_layers_are_refused(monkeypatch):
    model = make_model("llama")
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 0.5 * forward(hidden))
    with pytest.raises(ValueError, match="must be 'full' for LlamaForCausalLM: its logits are not its output layer's"):
        ChunkedHead(model)


# Adapters


def test_an_adapter_and_the_router_are_trained_saved_and_resumed(tmp_path, signals):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    undisturbed = train(tmp_path / "undisturbed", signals, peft_config=LORA, dtype=torch.float32, **options)
    for name, value in undisturbed.mold_loss.named_parameters():
        assert value.grad is None or not value.grad.any(), name
    saved = load_file(tmp_path / "undisturbed/checkpoint-2/mold_router.safetensors")
    assert saved["projection.bias"].any()
    assert not (tmp_path / "undisturbed/checkpoint-2/model.safetensors").exists()
    adapter = load_file(tmp_path / "undisturbed/checkpoint-2/adapter_model.safetensors")
    assert not any("router" in name for name in adapter)
    (tmp_path / "undisturbed/checkpoint-4").rename(tmp_path / "last")
    torch.manual_seed(99)
    resumed = make_trainer(
        tmp_path / "undisturbed",
        signals,
        make_student(layers=2),
        [BARE, *EXAMPLES[:7]],
        trainer_options={"peft_config": copy.deepcopy(LORA)},
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-2} | options,
    )
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_the_saved_adapter_is_an_ordinary_adapter(tmp_path, signals):
    trainer = train(tmp_path, signals, peft_config=LORA, dtype=torch.float32)
    trainer.save_model()
    model = PeftModel.from_pretrained(make_student(layers=2), tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_lora_on_the_output_layer_is_trained_or_refused(tmp_path, signals):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer = train(tmp_path, signals, peft_config=config, dtype=torch.float32)
    moved = [p for name, p in trainer.model.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert moved[0].any()
    for refused in (config, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])):
        with pytest.raises(ValueError, match="cross_entropy: is 'chunked', must be 'full' with an output layer"):
            train(tmp_path, signals, peft_config=refused, cross_entropy="chunked")


def test_adapters_that_cannot_be_used_are_refused(tmp_path, signals):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="peft_config: is PromptTuningConfig, must not put tokens before the text"):
        train(tmp_path, signals, peft_config=prompt)
    with pytest.raises(ValueError, match="peft_config: is given for a model that has an adapter"):
        make_trainer(
            tmp_path,
            signals,
            train(tmp_path, signals, peft_config=LORA).model,
            trainer_options={"peft_config": copy.deepcopy(LORA)},
        )


def test_padding_is_refused_where_there_is_none(tmp_path, signals):
    with pytest.raises(ValueError, match="padding_free: is True, must be False with padding_side"):
        make_trainer(tmp_path, signals, padding_free=True, padding_side="left")
