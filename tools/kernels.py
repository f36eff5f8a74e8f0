"""Compiles every Triton kernel for a GPU that need not be there, and tells what each would occupy of it.

    python -m tools.kernels [--arch 90] [--only nearest] [--json FILE]

A kernel that spills registers or asks for more shared memory than a block may have is marked, and the exit status
is then 1. Registers, stack and shared memory are read from the machine code by NVIDIA's cuobjdump, which Triton
brings along.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kernels.fused

# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Occupation:
    """What one kernel in one configuration takes: registers a thread, bytes of stack a thread, bytes shared a block."""

    case: str
    arch: int
    config: str
    registers: int
    stack: int
    shared: int
    tensor_cores: bool
    problem: str = ""


def main(
    arch: Annotated[int, typer.Option(help="compute capability without the dot: 80, 86, 89, 90, 100, 120")] = 90,
    only: Annotated[str, typer.Option(help="the kernels whose name contains this")] = "",
    to: Annotated[Path | None, typer.Option("--json", help="write the results there as well")] = None,
    jobs: Annotated[int, typer.Option(help="processes that compile at a time; 0: one a core")] = 0,
) -> None:
    if arch not in SHARED_BYTES:
        raise typer.BadParameter(f"expected one of {', '.join(map(str, SHARED_BYTES))}, got {arch}")
    table = Table(title=f"Triton kernels compiled for sm_{arch} (a block may share {SHARED_BYTES[arch]:,} bytes)")
    for heading, side in (
        ("kernel", "left"),
        ("configuration", "left"),
        ("registers", "right"),
        ("stack B", "right"),
        ("shared B", "right"),
        ("tensor cores", "left"),
        ("problem", "left"),
    ):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    found = list(occupations(arch, only, jobs or os.cpu_count() or 1))
    for one in found:
        cells = (one.registers, one.stack, f"{one.shared:,}", "yes" if one.tensor_cores else "", one.problem)
        table.add_row(one.case, one.config, *map(str, cells))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log, whose lines need no wrapping
    console.print(table)
    if to is not None:
        to.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    if not found:
        raise typer.BadParameter(f"no kernel's name contains {only!r}")
    raise typer.Exit(1 if any(one.problem for one in found) else 0)


def occupations(arch: int, only: str = "", jobs: int = 1) -> Iterator[Occupation]:
    """Every case of every module of kernels.fused, compiled in each configuration that suits `arch`."""
    todo = [
        (module.name, place, arch)
        for module in pkgutil.iter_modules(kernels.fused.__path__)
        for place, case in enumerate(_cases(module.name))
        if only in case.name
    ]
    # Fresh processes: a forked one would share this one's threads and compilers.
    with ProcessPoolExecutor(min(jobs, len(todo)) or 1, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_compile_all, todo):
            yield from found


def _compile_all(todo: tuple[str, int, int]) -> list[Occupation]:
    module, place, arch = todo
    case = _cases(module)[place]
    return [compile_case(case, config, arch) for config in case.suitable(SHARED_BYTES[arch])]


def _cases(module: str) -> list[Any]:
    cases: list[Any] = getattr(importlib.import_module(f"kernels.fused.{module}"), "compile_cases", list)()
    return cases


def compile_case(case: Any, config: Any, arch: int) -> Occupation:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = case.function()
    constants = {**case.constants, **config.kwargs}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in function.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name not in constants
        and name not in case.odd
        and (signature[name].startswith("*") or signature[name] == "i32")
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    shared = compiled.metadata.shared
    problems = []
    if stack > case.spills:
        problems.append(f"{stack} bytes of registers spilled")
    if shared > SHARED_BYTES[arch]:
        problems.append(f"{shared:,} bytes shared")
    return Occupation(
        case=case.name,
        arch=arch,
        config=describe(config),
        registers=registers,
        stack=stack,
        shared=shared,
        tensor_cores=bool(re.search(r"\b(wgmma|tcgen05)\.mma|\bmma\.sync", assembly)),
        problem="; ".join(problems),
    )


def describe(config: Any) -> str:
    blocks = [f"{name}={value}" for name, value in config.kwargs.items()]
    return ", ".join([*blocks, f"{config.num_warps} warps", f"{config.num_stages} stages"])


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, which are where registers spill to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no registers: {usage!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    typer.run(main)
