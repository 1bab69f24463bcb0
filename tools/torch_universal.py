"""mold_kernels as a kernel of Hugging Face's Hub: build/torch-universal and its metadata, as `kernels` loads them.

python tools/torch_universal.py [FOLDER]      # makes FOLDER/build; without it, in the current one
hf upload OWNER/mold-kernels build build --repo-type kernel --revision v0     # publishes it

Universal means Python and Triton alone: the compiled modules are not in it. `kernels` gives every copy a name of its
own, so that imports become relative; the operators take that name as their namespace.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "mold-kernels"
VERSION = 0
"""The major version of the interface, 0 while that may still change."""
LEFT_OUT = {"testing.py"}
"""What serves the tests and benchmarks of this repository."""
ABSOLUTE_IMPORT = re.compile(r"^( *)from mold_kernels(\.\S+)? import ", re.MULTILINE)


def with_relative_imports(source: str, depth: int) -> str:
    """The module's source with `from ..` for `from mold_kernels.`, in a folder `depth` below the package."""
    relative = ABSOLUTE_IMPORT.sub(
        lambda found: f"{found[1]}from {'.' * (depth + 1)}{(found[2] or '.')[1:]} import ", source
    )
    if left := re.search(r"^ *(import|from) mold_kernels\b.*", relative, re.MULTILINE):
        raise ValueError(f"{left[0].strip()!r}: must be `from mold_kernels... import ...`, which can be made relative")
    return relative


def build(folder: Path) -> Path:
    """Write folder/build/torch-universal anew; returns it."""
    variant = folder / "build" / "torch-universal"
    shutil.rmtree(variant, ignore_errors=True)
    package, digests = ROOT / "mold_kernels", {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.name in LEFT_OUT:
            continue
        source = with_relative_imports(path.read_text(), len(name.parts) - 1).encode()
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_bytes(source)
        digests[name.as_posix()] = base64.b64encode(hashlib.sha256(source).digest()).decode()
    identity = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:7]
    metadata = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_universal_{identity}",
        "version": VERSION,
        "license": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"],
        "python-depends": [],
        "backend": {"type": "cuda", "archs": ["8.0+PTX"]},  # from there on: Triton compiles where it runs
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    print(build(Path(*sys.argv[1:2])))
