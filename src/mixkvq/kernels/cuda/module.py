"""CUDA C++ to a kernel that can be launched: NVRTC and the driver, through NVIDIA's ``cuda-bindings``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

FOLDER = Path(__file__).parent
HEADERS = (
    "intrinsics.cuh",
    "numbers.cuh",
    "common.cuh",
    "codes.cuh",
    "keys.cuh",
    "values.cuh",
    "pages.cuh",
    "dense.cuh",
    "merge.cuh",
)

#: The first compute capability that has all instructions of these kernels: asynchronous copies, 8-bit products.
CAPABILITY = (8, 0)
#: Why no kernel of this folder can run, where :func:`has_bindings` says so.
NO_BINDINGS = "the package cuda-bindings is missing, or the libraries that it needs"


class CudaError(RuntimeError):
    """NVRTC or the driver refused something."""


class Kernel:
    """A kernel of a compiled module.

    Args:
        cubin: machine code for the current device.
        name: the kernel; a constant ``shared_bytes`` of the module says what a launch must reserve.
    """

    def __init__(self, cubin: bytes, name: str) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._module = _check(driver.cuModuleLoadData(cubin))
        self._function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
        address, size = _check(driver.cuModuleGetGlobal(self._module, b"shared_bytes"))
        shared = ctypes.c_uint()
        _check(driver.cuMemcpyDtoH(ctypes.addressof(shared), address, size))
        self.shared_bytes = shared.value
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self._function, attribute, self.shared_bytes))
        self._resident: dict[int, int] = {}

    def resident_blocks(self, threads: int) -> int:
        """Blocks that a multiprocessor runs at the same time."""
        if threads not in self._resident:
            occupancy = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
            self._resident[threads] = int(_check(occupancy(self._function, threads, self.shared_bytes)))
        return self._resident[threads]

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Run on the current stream; ``arguments`` is the kernel's one parameter."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream().cuda_stream
        at = ctypes.addressof(parameters)
        _check(self._driver.cuLaunchKernel(self._function, *grid, threads, 1, 1, self.shared_bytes, stream, at, 0))


class LaunchableKernel(Protocol):
    """What launchers need of :class:`Kernel`; tests have another."""

    def resident_blocks(self, threads: int) -> int: ...

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None: ...


@functools.cache
def has_bindings() -> bool:
    """Whether NVRTC can be called: bindings are no proof of the libraries behind them, nor of a GPU of NVIDIA's."""
    if torch.version.hip is not None:
        return False
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return False
    return True


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as (major, minor)."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def refusal(device: torch.device, shared: int) -> str | None:
    """Why a device cannot run a kernel that needs so many bytes of shared memory, or None if it can."""
    found, limit = capability(device), shared_limit(device)
    if found < CAPABILITY:
        return "compute capability {}.{}".format(*found)
    return None if shared <= limit else f"{shared:,} bytes of shared memory, of which the device has {limit:,}"


def address(x: torch.Tensor | None) -> int | None:
    """Where a tensor begins, for a kernel's arguments."""
    return None if x is None else x.data_ptr()


@lru_cache(maxsize=64)
def load_kernel(source: str, name: str, macros: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """Compile a file of this folder with some macros for a device, once in a process.

    Raises:
        CudaError: with the compiler's log.
    """
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        _enter_context(device)
        return Kernel(compile_source(source, dict(macros), f"sm_{major}{minor}"), name)


def _enter_context(device: int) -> None:
    """Make the device's primary context current, as torch does with a thread's first kernel."""
    from cuda.bindings import driver

    if int(_check(driver.cuCtxGetCurrent())) == 0:
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))


def compile_source(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Machine code of a file of this folder; needs no GPU."""
    from cuda.bindings import nvrtc

    headers = [(FOLDER / header).read_bytes() for header in HEADERS]
    names = [header.encode() for header in HEADERS]
    code = (FOLDER / source).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(code, source.encode(), len(headers), headers, names))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise CudaError(f"{source} does not compile for {architecture}:\n{log.decode(errors='replace')}")
    cubin = bytes(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _check(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise CudaError(f"{status!r}")
    return values[0] if len(values) == 1 else tuple(values)
