"""CUDA kernels compiled for the CPU, to test them where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from mixkvq.kernels.cuda.module import FOLDER, HEADERS

COMPILER = shutil.which("g++")
MAIN = """
static {arguments} the_arguments;
extern "C" void emulate(const {arguments}* a, unsigned x, unsigned y, unsigned z, unsigned threads) {{
    if (sizeof(Memory) > sizeof(shared)) std::abort();
    the_arguments = *a;
    emulator::run([] {{ {kernel}(the_arguments); }}, {{x, y, z}}, threads);
}}
"""


class EmulatedKernel:
    """Stands in for :class:`mixkvq.kernels.cuda.module.Kernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.shared_bytes = ctypes.c_uint.in_dll(library, "shared_bytes").value

    def resident_blocks(self, threads: int) -> int:
        return 1

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        self._library.emulate(ctypes.byref(arguments), *grid, threads)


@lru_cache(maxsize=64)
def load_kernel(source: str, name: str, macros: tuple[tuple[str, int], ...], device: int) -> EmulatedKernel:
    """As :func:`mixkvq.kernels.cuda.module.load_kernel`, with g++."""
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="mixkvq-emulator-"))
    main = MAIN.format(arguments="Arguments", kernel=name)
    (folder / "kernel.cpp").write_text((FOLDER / source).read_text() + main)
    for header in HEADERS:
        shutil.copy(FOLDER / header, folder)
    shutil.copy(Path(__file__).parent / "intrinsics.cuh", folder)
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", *(f"-D{key}={value}" for key, value in macros)]
    library = folder / "kernel.so"
    subprocess.run([COMPILER, *options, "-o", library, folder / "kernel.cpp"], check=True, cwd=folder)
    return EmulatedKernel(ctypes.CDLL(str(library)))
