"""C of this package, compiled when first used, for the machine it runs on, and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

_OPTIONS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-shared", "-fPIC")
# Best first; a compiler may know neither the processor nor the width.
_TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())

Works = Callable[[ctypes.CDLL], str | None]


class CannotCompileError(Exception):
    """There is no compiler, or it failed; says why, as part of a sentence."""


def c_library(source: Path, *, depends: Sequence[Path], libraries: Sequence[str], works: Works) -> ctypes.CDLL:
    """The shared library made of one C file.

    It lies in $TWINSTREAM_CACHE, else $XDG_CACHE_HOME/twinstream, else ~/.cache/twinstream, under a name that
    changes with the source, the compiler and the processor; where none of these can be written, it is made anew by
    every process. A file that is damaged or does not load is replaced. Any number of processes may come at once.

    Args:
        source: the C file.
        depends: files of ours that it includes.
        libraries: what to link with, such as "jpeg".
        works: whether a loaded library can be used, or the reason why not.

    Raises:
        CannotCompileError: there is no compiler, or it or what it made fails.
    """
    compiler = _compiler()
    options = [*_OPTIONS, *_environment_options()]
    key = hashlib.blake2b(digest_size=12)
    for part in (*compiler, _run([*compiler, "--version"]).stdout, *options, str(_TUNINGS), *libraries, _processor()):
        key.update(part.encode() + b"\0")
    for file in (source, *depends):
        key.update(file.read_bytes())
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="twinstream-") as private:  # may go as soon as it is loaded
            return _compile(compiler, options, source, libraries, works, Path(private) / "library.so")
    target = folder / f"{source.stem}-{key.hexdigest()}.so"
    return _load(target, works) or _compile(compiler, options, source, libraries, works, target)


def _compile(
    compiler: list[str], options: list[str], source: Path, libraries: Sequence[str], works: Works, target: Path
) -> ctypes.CDLL:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{source.stem}-", suffix=".so")
    os.close(handle)
    made = Path(name)
    try:
        linked = [f"-l{library}" for library in libraries]
        for tuning in _TUNINGS:
            done = _run([*compiler, *options, *tuning, str(source), *linked, "-o", name])
            if done.returncode == 0:
                break
        else:
            lines = done.stderr.splitlines() or ["no message"]
            raise CannotCompileError(
                f"{compiler[0]} failed: {next((x for x in lines if 'error:' in x or 'cannot find' in x), lines[0])}"
            )
        code = made.read_bytes()
        made.write_bytes(code + _seal(code))
        # Loaded under its own name: the loader would answer with the old library for that of the target.
        library = ctypes.CDLL(name, mode=_MODE)
        reason = works(library)
        if reason is not None:
            raise CannotCompileError(reason)
        made.replace(target)
        return library
    except OSError as error:
        raise CannotCompileError(f"what {compiler[0]} made of {source.name} cannot be used: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def _load(file: Path, works: Works) -> ctypes.CDLL | None:
    """A library that was compiled before; None where there is none or it is of no use."""
    try:
        content = file.read_bytes()
        code, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
        if seal != _seal(code):  # loading a file that was cut short could end the process
            return None
        library = ctypes.CDLL(str(file), mode=_MODE)
    except OSError:
        return None
    return library if works(library) is None else None


# Other modules bring their own libjpeg: ours must find the one that it was linked with.
_MODE = os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0)
_SEAL_BYTES = 32


def _seal(code: bytes) -> bytes:
    """Appended to a library, which the loader does not mind."""
    return hashlib.blake2b(code, digest_size=_SEAL_BYTES).digest()


def _compiler() -> list[str]:
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CannotCompileError("there is no C compiler (looked for $CC, cc, gcc and clang)")


def _environment_options() -> list[str]:
    """A conda environment has headers and libraries of its own, which every compiler must be told of."""
    root = Path(sys.prefix)
    if not (root / "conda-meta").is_dir():
        return []
    return [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _cache_folder() -> Path | None:
    own, shared = os.environ.get("TWINSTREAM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "twinstream"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=os.environ | {"LC_ALL": "C"}, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(f"{command[0]} cannot be run: {error}") from error
