"""`import mold` is light, registers the attention whatever is imported first, and has every name that it promises."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mold
from tests.tiny_models import make_model

ROOT = Path(mold.__file__).parents[1]


def run(code, *arguments):
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:mold", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_nothing_heavy():
    heavy = "torch", "transformers", "numpy", "accelerate", "mold_kernels", "yaml"
    code = f"import sys, mold; dir(mold), mold.__version__; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


ORDERS = {
    "mold first": "import mold",
    "transformers first, lazy": "import transformers; import mold",
    "the models first": "import transformers.modeling_utils, transformers.masking_utils; import mold",
    "reloaded": "import importlib, mold, transformers.modeling_utils; importlib.reload(mold)",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_attention_is_there_whatever_is_imported_first(tmp_path, order):
    model = make_model("llama", vocab=64)
    model.save_pretrained(tmp_path)
    code = f"""
import sys
{ORDERS[order]}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="mold")
assert "mold.method.attention_interface" not in sys.modules
ids, spans = torch.arange(12)[None], torch.tensor([[[0, 6], [6, 12]]], dtype=torch.int32)
out = model(input_ids=ids, row_spans=spans, key_spans=spans, output_attentions=True, use_cache=False)
assert out.attentions[0].attention.shape == (1, 2, 2)
mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
outputs = {{}}
for name in ("mold", "eager"):
    model.set_attn_implementation(name)
    outputs[name] = model(input_ids=ids, attention_mask=mask).logits[:, 1:]
torch.testing.assert_close(outputs["mold"], outputs["eager"])
"""
    run(code, tmp_path)


def test_every_name_is_where_it_lives():
    for home, names in mold._HOMES.items():
        module = importlib.import_module(f"mold.{home}")
        for name in names:
            assert getattr(mold, name) is getattr(module, name)
    assert set(mold.__all__) <= set(dir(mold))
    with pytest.raises(AttributeError, match="module 'mold' has no attribute 'MoldLos'"):
        _ = mold.MoldLos


def test_the_type_checkers_names_are_those_of_the_package():
    tree = ast.parse(Path(mold.__file__).read_text())
    (checking,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {
        node.module.removeprefix("mold."): tuple(alias.name for alias in node.names)
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == mold._HOMES
    assert sorted(mold.__all__) == sorted(name for names in mold._HOMES.values() for name in names)


def test_no_name_shadows_a_module():
    assert not set(mold.__all__) & {module.name for module in pkgutil.iter_modules(mold.__path__)}


def test_the_readme_imports_from_the_package_itself():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "mold":
                    assert node.module == "mold"
                    assert {alias.name for alias in node.names} <= set(mold.__all__)
