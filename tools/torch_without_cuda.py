"""Let a CUDA build of torch run on a CPU without NVIDIA's libraries, which are gigabytes.

python tools/torch_without_cuda.py SITE_PACKAGES

PyPI has no CPU builds of torch, and the dynamic linker wants every library that a CUDA build is
linked with. For tests on a CPU stand-ins do: libraries with the symbols that torch asks for, each
a function that returns 100, cudaErrorNoDevice. For environments that are thrown away only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp)\.so|ld-linux")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    result = {}
    for library in needed:
        if SYSTEM.match(library) or (folder / library).exists():
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


def main(site_packages: Path) -> None:
    folder = site_packages / "torch" / "lib"
    for name, versions in missing_libraries(folder).items():
        write_stand_in(folder / name, versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
