"""Which versions of vLLM the backend works with. Its interface changes from release to release."""

from __future__ import annotations

TESTED = (0, 26)
EXPERIMENTAL = (0, 33)


def check_version(version: str) -> bool:
    """Whether this version is the tested one, else an experimental one.

    Raises:
        ImportError: for every other version, naming it.
    """
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:  # a build from source without tags
        release = ()
    if release not in (TESTED, EXPERIMENTAL):
        raise ImportError(
            f"prism_cuda: the attention backend does not know vLLM {version}; expected "
            f"{_name(TESTED)}, or {_name(EXPERIMENTAL)} as an experiment"
        )
    return release == TESTED


def _name(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}.x"
