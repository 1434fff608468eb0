"""Let a CUDA build of torch run on a CPU without NVIDIA's libraries, which are gigabytes.

PYTHON tools/torch_without_cuda.py      PYTHON: of an environment with `pip install --no-deps torch`

PyPI has no CPU builds of torch, and the dynamic linker wants every library that a CUDA build is
linked with. For tests on a CPU the small CUDA runtime and stand-ins do: libraries with the symbols
that torch asks for, each a function that returns 100, cudaErrorNoDevice. For environments that
are thrown away only.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp)\.so|ld-linux")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def runtime_requirement() -> str:
    """Return the package of the CUDA runtime among those that the installed torch names."""
    for requirement in importlib.metadata.requires("torch") or ():
        if match := re.match(r"nvidia-cuda-runtime-cu12==[\d.]+", requirement):
            return match[0]
        if match := re.match(r"cuda-toolkit\[.*\]==([\d.]+)", requirement):
            return f"cuda-toolkit[cudart]=={match[1]}"
    raise SystemExit("error: this torch names no CUDA runtime")


def missing_libraries(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Return what torch's libraries need and do not have: {library: {version: symbols}}."""
    needed: set[str] = set()
    versions: dict[str, set[str]] = defaultdict(set)  # of a library
    symbols: dict[str, set[str]] = defaultdict(set)  # of a version
    for file in folder.glob("*.so"):
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", file)))
        # "… File: libx.so.1  Cnt: 1", then one line "… Name: VERSION  Flags: …" for each version.
        owner = ""
        for line in output("readelf", "-W", "-V", file).splitlines():
            if match := re.search(r"File: (\S+)", line):
                owner = match[1]
            elif match := re.search(r"  Name: (\S+)  Flags:", line):
                versions[owner].add(match[1])
        undefined = output("nm", "-D", "--undefined-only", "--with-symbol-versions", file)
        for name, version in re.findall(r" [Uw] (\w+)(?:@+(\S+))?$", undefined, re.MULTILINE):
            symbols[version].add(name)
    present = {path.name for path in (folder.parents[1] / "nvidia").rglob("lib*.so.*")}
    present |= {path.name for path in folder.iterdir()}
    result = {}
    for library in needed - present:
        if SYSTEM.match(library):
            continue
        result[library] = {version: symbols[version] for version in versions[library]}
        if not result[library]:  # its symbols have no version, but its name in front: ncclSend
            prefix = library.removeprefix("lib").split(".")[0].lower()
            result[library][""] = {s for s in symbols[""] if s.lower().startswith(prefix)}
    return result


def write_stand_in(library: Path, versions: dict[str, set[str]]) -> None:
    names = sorted(set().union(*versions.values()))
    code = "".join(f"int {name}(void) {{ return 100; }}\n" for name in names)
    command = ["cc", "-w", "-fno-builtin", "-shared", "-o", str(library)]
    command += [f"-Wl,-soname,{library.name}", "-x", "c", "-"]
    script = library.with_name(f"{library.name}.map")
    if "" not in versions:
        blocks = (f"{v} {{ global: {'; '.join(sorted(n))}; }};\n" for v, n in versions.items())
        script.write_text("".join(blocks))
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, input=code, text=True, check=True)
    script.unlink(missing_ok=True)


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", runtime_requirement()]
    subprocess.run(command, check=True)
    folder = Path(sysconfig.get_path("purelib")) / "torch" / "lib"
    for name, versions in missing_libraries(folder).items():
        write_stand_in(folder / name, versions)


if __name__ == "__main__":
    main()
