"""A pretended GPU: tensors that say `cuda`, hold CPU memory and refuse what CUDA refuses.

    with pretended_gpu() as gpu:
        ...                     # torch.device("cuda") works; gpu.waits counts where the host waits

Values are those of the CPU, so whole runs can be made on it. It refuses operations on tensors of
two devices, generators of another device, GPU tensors that are pickled or made arrays of numpy,
launches beyond CUDA's grids, and group norm's channels-last input, as torch did before 2.14; each
with the line of `core` that asked for it. It counts operations on the GPU, bytes that each reads
and writes, and where the host waits for it: uploads, downloads, and values that decide something.
Where torch may use TF32, it does.

It does not see assignments to `parameter.data`, nor autocast inside of C++, which it imitates for
the layers of the networks, nor DistributedDataParallel, NCCL or any real kernel.
"""

import math
import sys
from collections import Counter, namedtuple
from collections.abc import Callable
from collections.abc import Generator as Yields
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CORE = str(Path(__file__).resolve().parents[1] / "core") + "/"
GPU = torch.device("cuda", 0)
MOST_BLOCKS = 65_535
"""Of a grid's second and third dimension, on every CUDA device."""

_aten: Any = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
_DECIDING = (_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select)
_PRODUCTS = (_aten.mm, _aten.mv, _aten.bmm, _aten.addmm, _aten.addmv, _aten.baddbmm, _aten.dot)
_IN_LOW_PRECISION: set[Any] = {
    *(F.conv2d, F.linear, F.scaled_dot_product_attention),
    *(torch.bmm, torch.mm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
}
"""Where autocast rounds the inputs, of what the networks use."""
_IDLE = (_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty)
"""What touches no value, besides views."""
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


class GpuError(RuntimeError):
    """What CUDA, or torch for it, would have refused."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; to C++ it lies on `meta`, as for CUDA it asks the driver."""

    device, is_cuda, is_cpu, is_meta = GPU, True, False, False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> "OnGpu":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="meta",
            _extra_dispatch_keys=_KEYS,
        )
        self.memory = memory
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGpu({self.memory!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGpu":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if _is_parameter(self) else copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GpuError(f"a GPU tensor is pickled, or sent as an object to a rank, {place()}")

    def numpy(self, **_: Any) -> Any:
        raise GpuError(f"numpy cannot read a tensor on cuda:0, {place()}")

    def tolist(self) -> Any:
        return self.cpu().tolist()


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _each(change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree of tuples, lists and dictionaries with its leaves changed."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([_each(change, branch) for branch in tree])
    if isinstance(tree, dict):
        return {name: _each(change, branch) for name, branch in tree.items()}
    return change(tree)


def memory(tree: Any) -> Any:
    """The same with CPU tensors in place of the pretended ones."""
    return _each(lambda leaf: leaf.memory if isinstance(leaf, OnGpu) else leaf, tree)


def place() -> str:
    """The line of `core` that is being run."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(CORE):
            return f"at core/{frame.f_code.co_filename.removeprefix(CORE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of core"


class Gpu:
    """What was done: operations on the GPU, their bytes, and where the host waited for it."""

    def __init__(self, memory: str = "cpu") -> None:
        self.memory = torch.device(memory)
        self.operations = 0
        self.waits: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def wait(self, why: str) -> None:
        self.waits[f"{why} {place()}"] += 1

    def touch(self, name: str, *values: Any) -> None:
        """Counts tensors among the values as read or written, once each, by one operation."""
        for each in memory(values):
            if isinstance(each, torch.Tensor):
                apart = zip(each.shape, each.stride(), strict=True)  # An expanded value is one.
                count = math.prod(size for size, stride in apart if stride)
                self.bytes[name] += count * each.element_size()


_gpu = Gpu()


def _check_launch(func: Any, args: Any) -> None:
    """Refuses what asks CUDA for too large a grid, which is no shortage of memory."""
    blocks = 0
    if func is _aten.native_group_norm_backward.default:
        blocks = args[8]  # Of a grid (images, groups).
    if func is F.scaled_dot_product_attention:
        blocks = args[0].shape[0]
    if blocks > MOST_BLOCKS:
        name = getattr(func, "__name__", str(func))
        raise GpuError(
            f"CUDA error: invalid configuration argument: {name} with {blocks} blocks in a "
            f"dimension that takes {MOST_BLOCKS}, {place()}"
        )


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does an operation on the CPU, if a GPU could do it as well."""
    tensors: list[Any] = []
    _each(lambda leaf: isinstance(leaf, torch.Tensor) and tensors.append(leaf), [args, kwargs])
    mine = {id(each.memory): each for each in tensors if isinstance(each, OnGpu)}
    others = [each for each in tensors if not isinstance(each, OnGpu)]
    device = kwargs.get("device")
    on_gpu = bool(mine) if device is None else torch.device(device).type != "cpu"
    if mine or on_gpu:
        _refuse(func, args, list(mine.values()), others)
        _check_launch(func, args)
        _count_waits(func, args, kwargs, bool(mine), bool(others), on_gpu)
        _gpu.operations += 1
    if device is not None:
        kwargs = {**kwargs, "device": _gpu.memory if on_gpu else torch.device("cpu")}
    args = memory(args)
    if mine and func.overloadpacket in _PRODUCTS:
        args = _each(_rounded, args)
    out = func(*args, **memory(kwargs))
    if func is _aten.convolution.default and args[0].is_meta:
        out = out.contiguous(memory_format=_order(args[0]))  # As cuDNN gives it; meta does not.
    if (mine or on_gpu) and not func.is_view and func.overloadpacket not in _IDLE:
        written = out if isinstance(out, (tuple, list)) else [out]
        _gpu.touch(str(func.overloadpacket), *tensors, *written)
    if not on_gpu or func in (_aten._local_scalar_dense.default, _aten.equal.default):
        return out

    def back(leaf: Any) -> Any:  # What was changed in place is the tensor that it was.
        return (
            mine[id(leaf)]
            if id(leaf) in mine
            else OnGpu(leaf)
            if isinstance(leaf, torch.Tensor)
            else leaf
        )

    return _each(back, out)


def _order(images: torch.Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _rounded(leaf: Any) -> Any:
    """To the 10 bits of TF32, where products of float32 may have those."""
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float32:
        return leaf
    if torch.get_float32_matmul_precision() == "highest":
        return leaf
    return ((leaf.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _refuse(func: Any, args: Any, mine: list[Any], others: list[Any]) -> None:
    packet = func.overloadpacket
    indexed = packet in _INDEXING and isinstance(args[0], OnGpu)
    if mine and others and func not in _COPIES and not indexed:
        written = args[0] is others[0] and func._schema.name.endswith("_")
        if written or any(each.dim() for each in others):
            shapes = [f"{tuple(t.shape)} on {t.device}" for t in (*mine, *others)]
            raise GpuError(f"tensors on two devices: {packet} of {', '.join(shapes)}, {place()}")
    # Of F.group_norm torch made a contiguous copy.
    direct = func is _aten.native_group_norm.default and "per_example_gradients" in place()
    if direct and not args[0].memory.is_contiguous():
        raise GpuError(f"Expected X.is_contiguous(memory_format) to be true, {place()}")


def _returns_at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy was asked to; what it uploads, CUDA copies aside first."""
    in_place = func is _aten.copy_.default
    return args[2] if in_place and args[2:] else kwargs.get("non_blocking", False)


def _count_waits(
    func: Any, args: Any, kwargs: dict[str, Any], mine: bool, others: bool, on_gpu: bool
) -> None:
    packet = func.overloadpacket
    if func in _COPIES:
        if func is _aten.copy_.default:
            from_gpu, to_gpu = (isinstance(each, OnGpu) for each in (args[1], args[0]))
        else:
            from_gpu, to_gpu = mine, on_gpu
        if to_gpu and not from_gpu and _returns_at_once(func, args, kwargs):
            return
        if from_gpu != to_gpu:
            _gpu.wait("upload" if to_gpu else "download")
    elif packet in _DECIDING:
        _gpu.wait(packet.__name__)
    elif packet in _INDEXING:
        masks = [each for each in args[1] if each is not None]
        if others or any(each.dtype in (torch.bool, torch.uint8) for each in masks):
            _gpu.wait(packet.__name__)


class _Dispatch(TorchDispatchMode):
    """Sees factories, and operations on CPU tensors alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees generators, names of devices without a number, and what autocast rounds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.device:
            args = tuple(map(_numbered, args))
            kwargs = {name: _numbered(value) for name, value in kwargs.items()}
        generator = kwargs.get("generator")
        if isinstance(generator, _Generator):
            first = args[0] if args and isinstance(args[0], torch.Tensor) else None
            default = "cpu" if first is None else first.device
            wanted = torch.device(kwargs.get("device") or default).type
            if generator.device.type != wanted:
                raise GpuError(
                    f"{func.__name__} on {wanted} with a generator of {generator.device.type}, "
                    f"{place()}"
                )
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnGpu):
            _check_launch(func, args)
        if func in _IN_LOW_PRECISION and torch.is_autocast_enabled("cuda"):
            args = tuple(
                each.bfloat16() if isinstance(each, OnGpu) and each.is_floating_point() else each
                for each in args
            )
        return func(*args, **kwargs)


def _numbered(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value) == "cuda"
    return GPU if named else value


class _Generator(torch.Generator):
    """Draws on the CPU, and says where it would."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        self = super().__new__(cls, "cpu")
        self.home = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.home


_Card = namedtuple("_Card", "name total_memory")
_DRIVER: dict[str, Any] = {
    "_lazy_init": None,
    "synchronize": None,
    "empty_cache": None,
    "set_device": None,
    "is_available": True,
    "is_bf16_supported": True,
    "current_device": 0,
    "device_count": 1,
    "get_device_name": "pretended",
    "mem_get_info": (70 << 30, 80 << 30),
    "get_device_capability": (9, 0),
    "set_per_process_memory_fraction": None,
    "get_device_properties": _Card("pretended", 80 << 30),
}
"""What `torch.cuda` answers."""


@contextmanager
def pretended_gpu(memory_on: str = "cpu") -> Yields[Gpu]:
    """A GPU in this process until the block ends; yields what is counted.

    Args:
        memory_on: `meta` computes shapes alone, so that full-size networks fit.
    """
    global _gpu
    _gpu = Gpu(memory_on)
    save, load = torch.save, torch.load

    def loaded(path: Any, map_location: Any = None, **how: Any) -> Any:
        to_gpu = map_location is not None and torch.device(map_location).type == "cuda"
        state = load(path, map_location="cpu" if to_gpu else map_location, **how)
        moved = lambda leaf: leaf.to(GPU) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
        return _each(moved, state) if to_gpu else state

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in _DRIVER.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch, "save", lambda state, to, **how: save(memory(state), to, **how))
        patch.setattr(torch, "load", loaded)
        patch.setattr(
            torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None
        )
        for name in ("all_reduce", "broadcast"):
            patch.setattr(dist, name, _of_gpu_tensors(getattr(dist, name)))
        with _Functions(), _Dispatch():
            yield _gpu


def _of_gpu_tensors(collective: Any) -> Any:
    """NCCL's: it takes no tensor of the CPU."""

    def checked(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, OnGpu):
            raise GpuError(f"{collective.__name__} of a tensor on {tensor.device}, {place()}")
        return collective(tensor.memory, *args, **kwargs)

    return checked
