"""A GPU for machines without one: tensors that say they are on cuda:0 and compute on the CPU.

Two things that only a GPU would show are found in this way. An operation on tensors of both devices
raises `DeviceMismatch`, as CUDA would. And every place where the host waits for the GPU is counted,
with the line of this project that made it: reading a value (`.item()`, `.tolist()`, `bool()`),
shapes that depend on values (`nonzero`, boolean masks as indices), and blocking copies.

    with pretend_gpu():                       # models, DeepSpeed engines and batches "on the GPU"
        trainer = build(...)
        with counted() as syncs:
            trainer.iteration(0)
    assert syncs.total == 0, syncs            # a table: how often, what, and where

What it cannot show: speed, memory, kernels that CUDA lacks, and anything that asks `torch.cuda`.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
ROOT = f"{Path(__file__).resolve().parents[2]}/"

WAITS = {
    "_local_scalar_dense": "item",
    "is_nonzero": "bool",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
    "equal": "equal",
    "bincount": "bincount",
}
"""Operators whose result the host must have before it can go on."""

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")

TAKES_SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "clamp", "clamp_", "lift_fresh"}
"""Operators, besides those on single elements, that accept a CPU tensor without dimensions."""


class DeviceMismatch(RuntimeError):
    """An operation has tensors of both devices."""


class Syncs:
    """The places at which the host waited."""

    def __init__(self) -> None:
        self.places: Counter[tuple[str, str]] = Counter()

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def of(self, part: str) -> int:
        """How many are made by lines whose place contains `part`."""
        return sum(count for (_, place), count in self.places.items() if part in place)

    def __str__(self) -> str:
        rows = [f"{n:6d}  {kind:14s} {place}" for (kind, place), n in self.places.most_common()]
        return "\n".join([f"{self.total} host synchronizations", *rows])


_counting: list[Syncs] = []


@contextlib.contextmanager
def counted() -> Iterator[Syncs]:
    """Count the host synchronizations of the block; blocks may be nested."""
    syncs = Syncs()
    _counting.append(syncs)
    try:
        yield syncs
    finally:
        _counting.remove(syncs)


def _wait(kind: str) -> None:
    for syncs in _counting:
        syncs.places[kind, _place()] += 1


def _place() -> str:
    """The nearest line of this project, and of the library that it called, if any."""
    library = ""
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/.venv/" not in name:
            if name != __file__:
                return f"{name.removeprefix(ROOT)}:{frame.f_lineno}{library}"
        elif not library and "/torch/" not in name and "site-packages/" in name:
            library = f" in {name.split('site-packages/')[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return f"elsewhere{library}"


class OnGpu(Tensor):
    """Wraps a CPU tensor, `held`, which does the computing."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        self = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CPU,  # autograd would ask CUDA for its streams
        )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> "OnGpu":
        return OnGpu(self.held.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OnGpu)
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.held = value.held.detach()

    def __repr__(self, **_: Any) -> str:
        _wait("repr")
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        _check_devices(func, name, args, kwargs)
        _count(name, args, kwargs)
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0]
        result = tree_map(_wrapped, result)
        if any(isinstance(leaf, OnGpu) for leaf in tree_leaves(result)):
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


def _check_devices(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where CUDA would, which accepts some CPU tensors: scalars, indices, copies."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outside = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if not outside or name in ("_to_copy", "detach"):
        return
    if name == "copy_":
        _wait("copy to GPU" if isinstance(args[0], OnGpu) else "copy to CPU")
        return
    if name in INDEXING and isinstance(args[0], OnGpu):
        indices = {id(leaf) for leaf in tree_leaves(args[1])}
        if any(id(tensor) in indices for tensor in outside):
            _wait("copy to GPU")
        outside = [tensor for tensor in outside if id(tensor) not in indices]
    takes_scalars = torch.Tag.pointwise in func.tags or name in {*TAKES_SCALARS, *INDEXING}
    wrong = [tensor for tensor in outside if tensor.dim() > 0 or not takes_scalars]
    if wrong:
        raise DeviceMismatch(
            f"{func} of tensors on the CPU {[tuple(t.shape) for t in wrong]} and on the GPU "
            f"{[tuple(t.shape) for t in tensors if isinstance(t, OnGpu)]}"
        )


def _count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in WAITS:
        _wait(WAITS[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait("repeat_interleave")
    elif name in INDEXING:
        masks = [m for m in tree_leaves(args[1]) if isinstance(m, Tensor)]
        # x[mask] = scalar becomes masked_fill; everything else needs the number of true entries.
        filled = name != "index" and len(args) > 2 and args[2].numel() == 1
        if not filled and any(m.dtype in (torch.bool, torch.uint8) for m in masks):
            _wait("boolean index")


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.held


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnGpu) -> Tensor:
        return x.held.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient)


def _moved(x: Tensor, target: torch.device, blocking: bool) -> Tensor:
    if target.type == "meta":
        return torch.empty_like(_held(x), device="meta")
    if target.type == "cuda" and not isinstance(x, OnGpu):
        if blocking:
            _wait("copy to GPU")
        return _ToGpu.apply(x) if x.requires_grad and torch.is_grad_enabled() else OnGpu(x.clone())
    if target.type == "cpu" and isinstance(x, OnGpu):
        if blocking:
            _wait("copy to CPU")
        tracked = x.requires_grad and torch.is_grad_enabled()
        return _ToCpu.apply(x) if tracked else x.held.clone()
    return x


def _device(value: Any) -> torch.device | None:
    """What names a device: "cuda", a number, or a device."""
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    return torch.device(value) if isinstance(value, str | torch.device) else None


class _Functions(TorchFunctionMode):
    """Makes tensors on the GPU where `device=` asks for it, and moves them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if (getattr(func, "__module__", None) or "").startswith("torch.distributed"):
            return func(*tree_map(_held, args), **tree_map(_held, kwargs))
        first = args[0] if args else None
        if isinstance(first, OnGpu):
            if func is Tensor.tolist:
                _wait("tolist")
                return first.held.tolist()
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func in (Tensor.data_ptr, Tensor.is_contiguous):
                return func(first.held, *args[1:], **kwargs)
            if func is Tensor.is_pinned:
                return False
            if func is Tensor.new_tensor:
                kwargs = {"dtype": first.dtype, "device": GPU} | kwargs
                return torch.tensor(*args[1:], **kwargs)
        if func is Tensor.pin_memory:
            return first
        target = _device(kwargs.get("device"))
        if target is None or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        kwargs["device"] = CPU if target.type == "cuda" else target
        result = func(*args, **kwargs)
        if target.type == "cuda":
            if func in (torch.tensor, torch.as_tensor) and not isinstance(first, OnGpu):
                _wait("copy to GPU")
            return tree_map(_wrapped, result)
        return tree_map(_held, result) if target.type == "cpu" else result

    def _to(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = {Tensor.cuda: GPU, Tensor.cpu: CPU}.get(func, _device(kwargs.get("device")))
        dtype, blocking = kwargs.get("dtype"), not kwargs.get("non_blocking", False)
        for value in args:
            if isinstance(value, Tensor):
                target, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                blocking = not value
            elif value is not None:
                target = _device(value)
        if dtype is not None and dtype != x.dtype:
            x = x.type(dtype)
        elif kwargs.get("copy"):
            x = x.clone()
        return x if target is None else _moved(x, target, blocking)


def move_module(module: nn.Module) -> nn.Module:
    """Move all parameters and buffers to the GPU in place; tied ones stay tied."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None or isinstance(value, OnGpu):
                    continue
                if id(value) not in moved:
                    twin: Tensor = OnGpu(value.detach().clone())
                    if isinstance(value, nn.Parameter):
                        twin = nn.Parameter(twin, requires_grad=value.requires_grad)
                    moved[id(value)] = twin
                tensors[name] = moved[id(value)]
    return module


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Let this process believe that it has one GPU, which DeepSpeed trains on."""
    module_to = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cuda":
            return module_to(self, *args, **kwargs)
        if dtype is not None:
            module_to(self, dtype=dtype)
        return move_module(self)

    accelerator = type(get_accelerator())
    with pytest.MonkeyPatch.context() as patch, _Functions():
        patch.setattr(nn.Module, "to", to)
        patch.setattr(accelerator, "device_name", lambda self, index=None: "cuda:0")
        patch.setattr(accelerator, "current_device_name", lambda self: "cuda:0")
        yield
