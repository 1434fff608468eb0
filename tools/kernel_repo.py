#!/usr/bin/env python3
"""Write the package as a kernel repository, which transformers loads by a repository's name.

    python tools/kernel_repo.py OUT                     # builds the ops library under its own name
    python tools/kernel_repo.py OUT --library _C.so     # takes one built with PRISM_NAMESPACE

OUT/build/torch-stable-abi210-cu130-x86_64-linux/ then holds the Python package with relative
imports, the library and metadata.json. To try it without uploading it:

    LOCAL_KERNELS=me/prism=OUT python -c "..."   # attn_implementation="me/prism:prism_attention"

Several versions may be loaded by one process: ops are torch.ops.<namespace>, with a hash of the
sources in the name.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prism_cuda"
# Programs, and plug-ins of engines that load packages by themselves.
LEFT_OUT = ("__main__.py", "cli.py", "demo.py", "tune/", "integrations/vllm/")
ENTRY = '''

def prism_attention(*args, **kwargs):  # type: ignore[no-untyped-def]
    """The attention function of transformers; see integrations/transformers.py."""
    global _attention
    if _attention is None:
        from .integrations.transformers import PrismAttention  # needs transformers

        _attention = PrismAttention(PrismConfig())
    return _attention(*args, **kwargs)


_attention = None
# transformers 5.24 takes a function by its name only from modules that have this one as well.
flash_attn_forward = prism_attention
'''


def package_files() -> list[Path]:
    """The Python files of the repository, relative to the package."""
    files = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return [path for path in files if not path.as_posix().startswith(LEFT_OUT)]


def namespace() -> str:
    """The name of the ops: prism_cuda and a hash of everything they are made of."""
    digest = hashlib.sha256()
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in (*sources, *(PACKAGE / name for name in package_files())):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return f"prism_cuda_{digest.hexdigest()[:12]}"


def relocated(text: str, depth: int, name: str) -> str:
    """A file of the package as part of a package of any name, with ops of this name.

    Args:
        depth: folders between the package and the file.
    """
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*from )prism_cuda\.(?=\w)", rf"\g<1>{dots}", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*from )prism_cuda(?= import)", rf"\g<1>{dots}", text, flags=re.MULTILINE)
    left = re.search(r"^\s*(import|from) prism_cuda.*", text, flags=re.MULTILINE)
    if left:
        raise ValueError(f"kernel_repo: cannot make {left[0].strip()!r} relative")
    text = re.sub(r"torch\.ops\.prism(?=\b|_check\b)", f"torch.ops.{name}", text)
    text = text.replace(f"torch.ops.{name}_cuda", "torch.ops.prism_cuda")
    text = text.replace('"prism::', f'"{name}::').replace('f"prism::', f'f"{name}::')
    return text.replace('Library("prism"', f'Library("{name}"')


def build_library(name: str) -> Path:
    """Compile the ops under ``name``; objects are kept in build/kernel-repo."""
    folder = ROOT / "build" / "kernel-repo"
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PRISM_NAMESPACE": name}, check=True)
    return folder / "lib" / "prism_cuda" / "_C.abi3.so"


def build_config(library: Path, name: str) -> dict:
    """What the library says of itself, asked in a process of its own.

    Raises:
        ValueError: if its ops have another name.
    """
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        f"print(torch.ops.{name}.build_config())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(
            f"kernel_repo: {library} has no ops called {name}; build it with "
            f"PRISM_NAMESPACE={name}\n{result.stderr}"
        )
    return json.loads(result.stdout)


def variant_name(config: dict) -> str:
    """The folder of a build: what it needs to be loaded."""
    torch_target = config["torch_target"].replace(".", "")
    backend = "cu" + config["cuda"].replace(".", "") if config["cuda"] else "cpu"
    system = f"{platform.machine()}-{platform.system().lower()}"
    return f"torch-stable-abi{torch_target}-{backend}-{system}"


def cuda_arch(arch: str) -> str:
    """9.0a of 90a or 9.0a, as metadata has it."""
    found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch)
    return f"{found[1]}.{found[2]}{found[3]}{found[4] or ''}" if found else arch


def write(out: Path, library: Path, name: str, version: int) -> Path:
    """Write one variant; returns its folder."""
    config = build_config(library, name)
    variant = out / "build" / variant_name(config)
    variant.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=variant.parent) as temporary:
        made = Path(temporary, "variant")
        for path in package_files():
            target = made / path
            target.parent.mkdir(parents=True, exist_ok=True)
            text = relocated((PACKAGE / path).read_text("utf-8"), len(path.parts) - 1, name)
            entry = ENTRY if path.as_posix() == "__init__.py" else ""
            target.write_text(text + entry, "utf-8")
        shutil.copy(library, made / "_C.abi3.so")
        (made / "metadata.json").write_text(
            json.dumps(metadata(made, config, name, version), indent=2) + "\n", "utf-8"
        )
        shutil.rmtree(variant, ignore_errors=True)
        made.rename(variant)
    return variant


def metadata(folder: Path, config: dict, name: str, version: int) -> dict:
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    backend: dict[str, object] = {"type": "cuda" if config["cuda"] else "cpu"}
    if config["cuda"]:
        backend["archs"] = [cuda_arch(arch) for arch in config["archs"]]
    return {
        "id": name,
        "name": "prism-cuda",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--library", type=Path, help="a library built with PRISM_NAMESPACE")
    parser.add_argument("--namespace", default=namespace(), help="the library's")
    parser.add_argument("--version", type=int, default=1, help="of the repository's interface")
    args = parser.parse_args()
    library = args.library or build_library(args.namespace)
    print(write(args.out, library, args.namespace, args.version))


if __name__ == "__main__":
    main()
