"""Triton kernels compiled for a GPU that is not there."""

import os
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.knobs import nvidia


def compiled_without_spills(
    source: Any, arch: int, folder: Path, options: dict[str, Any] | None = None
) -> Any:
    """The kernel for one architecture; its assembler must not have run out of registers.

    Args:
        folder: that receives what is compiled.
    """
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    path = folder / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    command = [nvidia.ptxas.path, "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told, told
    return compiled
