"""libpixmim through ctypes: where it is found, what its functions take, and how tensors are handed to it.

A call costs a few microseconds and releases the GIL. On a GPU it enqueues its work on PyTorch's current stream; all
memory, workspace too, comes from PyTorch's allocator. Contexts and filters are made at first use and kept: run an op
once before capturing it in a CUDA graph.
"""

import contextlib
import ctypes
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

# PIXMIM_ABI_MAJOR of capi/include/pixmim.h, and the least PIXMIM_ABI_MINOR that has all that is called here.
ABI = (1, 0)
BUILD = "cargo build --release -p pixmim-capi"
MAX_DIMS = 6
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float64: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
}


class PixMIMError(RuntimeError):
    """What libpixmim refused or could not do. `status` is its pixmim_status."""

    def __init__(self, status: int, sentence: str):
        super().__init__(f"pixmim: {sentence}")
        self.status = status


class TensorView(ctypes.Structure):
    """pixmim_tensor."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS),
    ]


class ContextOptions(ctypes.Structure):
    """pixmim_context_options."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("bf16_products", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


def candidates() -> list[Path]:
    """Where the library may be, in the order of preference."""
    name = {"darwin": "libpixmim.dylib", "win32": "pixmim.dll"}.get(sys.platform, "libpixmim.so")
    if given := os.environ.get("PIXMIM_LIBRARY"):
        return [Path(given)]
    package = Path(__file__).resolve().parent
    repository = package.parent.parent
    target = Path(os.environ.get("CARGO_TARGET_DIR", repository / "target"))
    in_repository = [target / "release" / name] if (repository / "capi" / "Cargo.toml").exists() else []
    return [package / name, *in_repository]


def load() -> ctypes.CDLL:
    """The library, if it is there and has the ABI that this package calls."""
    paths = candidates()
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        places = ", ".join(map(str, paths))
        raise ImportError(
            f"pixmim: there is no library at {places}; build it with `{BUILD}`, or set PIXMIM_LIBRARY to its path"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.pixmim_abi_version
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"pixmim: {path} is no libpixmim that loads here ({error}); build it with `{BUILD}`"
        ) from error
    version.restype = ctypes.c_uint32
    major, minor = divmod(version(), 1 << 16)
    if major != ABI[0] or minor < ABI[1]:
        raise ImportError(
            f"pixmim: {path} has ABI {major}.{minor}, but this package calls {ABI[0]}.{ABI[1]} or a later {ABI[0]}.x; "
            f"take both from one version of the repository, and build the library with `{BUILD}`"
        )
    return library


LIBRARY = load()
LIBRARY.pixmim_last_error.restype = ctypes.c_char_p
_HANDLE = ctypes.POINTER(ctypes.c_void_p)
LIBRARY.pixmim_context_create.argtypes = [ctypes.c_int32, ctypes.POINTER(ContextOptions), _HANDLE]
LIBRARY.pixmim_filter_create.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, _HANDLE, ctypes.c_void_p]


def check(status: int) -> None:
    """Raises what a failing call left behind on this thread."""
    if status != 0:
        raise PixMIMError(status, LIBRARY.pixmim_last_error().decode(errors="replace"))


# By device ordinal (CPU: -1), and by (ordinal, size, radius). Made once, never freed: other threads may be in a call.
_contexts: dict[int, int] = {}
_filters: dict[tuple[int, int, float], int] = {}
_making = threading.Lock()


def _after_fork() -> None:
    """A child has neither the parent's threads nor its GPU, so it makes contexts of its own."""
    global _making
    _making = threading.Lock()
    _contexts.clear()
    _filters.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ordinal(device: torch.device) -> int:
    """The device as libpixmim counts them."""
    return -1 if device.type == "cpu" else device.index


def context(device: torch.device) -> int:
    """The context of a device. On the CPU with as many threads as PyTorch has when it is made."""
    if (found := _contexts.get(ordinal(device))) is not None:
        return found
    with _making:
        if ordinal(device) not in _contexts:
            made = ctypes.c_void_p()
            options = ContextOptions(struct_size=ctypes.sizeof(ContextOptions), threads=torch.get_num_threads())
            check(LIBRARY.pixmim_context_create(ordinal(device), options, made))
            _contexts[ordinal(device)] = made.value
    return _contexts[ordinal(device)]


def low_pass_filter(device: torch.device, size: int, radius: float) -> int:
    """The filter for images of `size` pixels a side."""
    key = (ordinal(device), size, radius)
    if (found := _filters.get(key)) is not None:
        return found
    on = context(device)
    with _making, _on(device) as stream:
        if key not in _filters:
            made = ctypes.c_void_p()
            check(LIBRARY.pixmim_filter_create(on, size, radius, made, stream))
            _filters[key] = made.value
    return _filters[key]


@contextlib.contextmanager
def _guarded(device: torch.device):
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _on(device: torch.device) -> contextlib.AbstractContextManager[int | None]:
    """Makes a GPU the current one, and gives PyTorch's current stream of it."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext(torch.cuda.current_stream(device).cuda_stream)
    return _guarded(device)


# The views of tensors but for their address, by (dtype, shape, device).
_templates: dict[Any, bytes] = {}
# Shapes that change all the time, as of cropped batches, must not fill the memory.
MOST_KEPT = 4096


def _template(tensor: torch.Tensor) -> bytes:
    dims, ndim = tensor.shape, tensor.ndim
    if (dtype := DTYPES.get(tensor.dtype)) is None or tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"pixmim: takes no tensor of {tensor.dtype} on {tensor.device}")
    if ndim > MAX_DIMS:
        raise ValueError(f"pixmim: takes tensors of at most {MAX_DIMS} dimensions, not of {ndim}: reshape it")
    strides = [math.prod(dims[i + 1 :]) for i in range(ndim)]
    pad = (0,) * (MAX_DIMS - ndim)
    size = ctypes.sizeof(TensorView)
    return bytes(TensorView(size, dtype, ordinal(tensor.device), ndim, None, (*dims, *pad), (*strides, *pad)))


_Three = ctypes.c_double * 3


class Function:
    """An op of libpixmim, called with a device and then with tensors and numbers in the order of the header.

    `arguments` has a letter for each between the context and the workspace: t tensor, l int64_t, u uint64_t, i int32_t,
    d double, v three doubles in a tuple, p handle.
    """

    KINDS = {
        "t": ctypes.POINTER(TensorView),
        "l": ctypes.c_int64,
        "u": ctypes.c_uint64,
        "i": ctypes.c_int32,
        "d": ctypes.c_double,
        "v": _Three,
        "p": ctypes.c_void_p,
    }

    def __init__(self, name: str, arguments: str, workspace: bool = True):
        self.function = getattr(LIBRARY, f"pixmim_{name}")
        scratch = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)] if workspace else []
        self.function.argtypes = [ctypes.c_void_p, *(self.KINDS[a] for a in arguments), *scratch, ctypes.c_void_p]
        self.workspace = workspace
        # Bytes of workspace by all arguments but addresses.
        self.bytes: dict[Any, int] = {}

    def __call__(self, device: torch.device, *arguments: Any) -> None:
        """Tensors are dense and, on a GPU, aligned to 16 bytes: see `dense`."""
        on = context(device)
        key, values = [], []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                described = (argument.dtype, argument.shape, argument.device)
                if (template := _templates.get(described)) is None:
                    if len(_templates) >= MOST_KEPT:
                        _templates.clear()
                    template = _templates[described] = _template(argument)
                # A copy each time: another thread may be in a call with the same shape.
                view = TensorView.from_buffer_copy(template)
                view.data = argument.data_ptr()
                key.append(described)
                values.append(view)
            else:
                key.append(argument)
                values.append(_Three(*argument) if isinstance(argument, tuple) else argument)
        with _on(device) as stream:
            if not self.workspace:
                check(self.function(on, *values, stream))
                return
            key = (device, *key)
            if (needed := self.bytes.get(key)) is None:
                asked = ctypes.c_size_t()
                check(self.function(on, *values, None, asked, stream))
                if len(self.bytes) >= MOST_KEPT:
                    self.bytes.clear()
                needed = self.bytes[key] = asked.value
            workspace = torch.empty(needed, dtype=torch.uint8, device=device)
            check(self.function(on, *values, workspace.data_ptr(), ctypes.c_size_t(needed), stream))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gaps and, on a GPU, at an address that kernels can load 16 bytes from; a copy if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 != 0 else tensor
