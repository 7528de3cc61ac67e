"""A named NVIDIA card that is not there: torch answers as it does on it, its tensors say that they are on cuda:0 and are kept by the CPU.

What is stood in for is the device alone, at torch's own functions: each is one that torch has here, or installing fails. Operations run on
the CPU, with what CUDA asks of them checked: all operands on the card, torch._int_mm's shapes. Triton's kernels run in its interpreter.
For a process of its own: what it changes stays changed.
"""
from __future__ import annotations

import functools
import itertools
import threading
import time
import types
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Card(NamedTuple):
    """name: as torch.cuda.get_device_name gives it. memory: bytes. l2: bytes of its cache."""
    name: str
    capability: tuple[int, int]
    processors: int
    memory: int
    l2: int


# Figures of NVIDIA's data sheets; the last two are for what the pack says to owners of cards without Triton or INT8.
CARDS = {card.name: card for card in (
    Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 << 30, 40 << 20),
    Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 << 30, 72 << 20),
    Card("NVIDIA L40S", (8, 9), 142, 48 << 30, 96 << 20),
    Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 << 30, 50 << 20),
    Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 << 30, 96 << 20),
    Card("Tesla T4", (7, 5), 40, 16 << 30, 4 << 20),
    Card("NVIDIA GeForce GTX 1080", (6, 1), 20, 8 << 30, 2 << 20),
)}
# What CUDA takes from the host: copies between the two, and indices.
CROSSES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.lift_fresh.default,
           aten.set_.source_Storage_storage_offset}


OURS = "int8_compile"  # the pack's operations: Python that asks for the device itself


class OnCard(torch.Tensor):
    """A tensor of cuda:0 whose values are in host, a tensor of the CPU."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
                                                   dtype=host.dtype, layout=host.layout, device=CARD)
        made.host = host
        return made

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, **_) -> str:
        return f"OnCard({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """What makes a tensor on the card without having one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == OURS:
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if has_kernel(function.name(), "CompositeImplicitAutograd"):
            with self:  # comes here whole under inference mode
                return function.decompose(*args, **kwargs)
        named = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if named or any(isinstance(leaf, OnCard) for leaf in _leaves((args, kwargs))):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


def _leaves(value) -> list[torch.Tensor]:
    found = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, value)
    return found


def _run(function, args, kwargs):
    """function on the CPU, of what the operands hold; its results on the card, unless it was asked for them elsewhere."""
    leaves = _leaves((args, kwargs))
    others = [leaf for leaf in leaves if not isinstance(leaf, OnCard) and leaf.dim()]
    if others and any(isinstance(leaf, OnCard) for leaf in leaves) and function not in CROSSES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({function} of "
                           f"{[(type(leaf).__name__, tuple(leaf.shape), str(leaf.device)) for leaf in leaves]})")
    _check(function, args)
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": CPU, **({"pin_memory": False} if kwargs.get("pin_memory") else {})}
    on_card = torch.device(asked).type == "cuda" if asked is not None else True
    plain, plain_kwargs = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnCard) else leaf, (args, kwargs))
    result = function(*plain, **plain_kwargs)
    if function._schema.name.endswith("_"):  # writes into its first operand, and returns it
        written = args[0]
        assert not isinstance(written, OnCard) or written.shape == written.host.shape, f"{function} is not stood in for"
        return written
    return tree_map(lambda leaf: OnCard(leaf) if on_card and type(leaf) is torch.Tensor else leaf, kwargs.get("out", result))


def _check(function, args):
    """What CUDA's kernels refuse and the CPU's do not."""
    if function is aten._int_mm.default:
        (m, k), n = args[0].shape, args[1].shape[1]
        if m <= 16 or k % 8 or n % 8:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, and sizes multiples of 8, but got {m} x {k} x {n}")
        if args[0].stride() != (k, 1) or args[1].stride() not in ((1, k), (n, 1)):
            raise RuntimeError("cuBLASLt takes dense rows")


class Event:
    """torch.cuda.Event, by the clock of the host."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, other) -> float:
        return (other.at - self.at) * 1e3 + 1e-6

    def wait(self, stream=None): ...

    def synchronize(self): ...

    def query(self) -> bool:
        return True


class Stream:
    """torch.cuda.Stream: everything has been done when it returns."""

    numbers = itertools.count(1)

    def __init__(self, device=None, priority=0, **_):
        self.cuda_stream, self.device = next(self.numbers), CARD

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def synchronize(self): ...

    def query(self) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


class Generator(torch.Generator):
    """torch.Generator, on the host."""

    def __new__(cls, device=None):
        return super().__new__(cls, CPU)


class State:
    """What a rehearsal may change about the card while it runs. calls: how often each function was asked."""

    def __init__(self, card: Card):
        self.card = card
        self.capturing = False
        self.allocator = "native"
        self.free = card.memory - (1 << 30)
        self.stream = Stream()
        self.calls: dict[str, int] = {}


def install(card: Card) -> State:
    """torch answers as on card from now on, in every thread, and computes on it."""
    state = answer(card)
    torch.tensor, torch.as_tensor = map(_from_host, (torch.tensor, torch.as_tensor))
    torch.Generator = Generator
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is a new one, of the tensor's type
    _in_every_thread()
    return state


def answer(card: Card) -> State:
    """torch's functions answer as on card from now on. Nothing can be computed on it: for fake tensors."""
    state = State(card)
    properties = types.SimpleNamespace(name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.memory,
                                       multi_processor_count=card.processors, L2_cache_size=card.l2, warp_size=32, gcnArchName="",
                                       is_integrated=False, regs_per_multiprocessor=65536, shared_memory_per_block_optin=99 << 10,
                                       max_threads_per_multi_processor=2048 if card.capability in ((8, 0), (9, 0)) else 1536)
    stats = {f"{name}.all.{kind}": 0 for name in ("active_bytes", "reserved_bytes", "allocated_bytes") for kind in ("current", "peak")}
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "is_initialized": lambda: True,
        "_lazy_init": lambda: None, "init": lambda: None, "set_device": lambda device: None, "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0, "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: card.capability, "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (state.free, card.memory), "memory_stats": lambda device=None: dict(stats),
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None, "ipc_collect": lambda: None, "_sleep": lambda cycles: None,
        "current_stream": lambda device=None: state.stream, "default_stream": lambda device=None: state.stream,
        "set_stream": lambda stream: None, "stream": lambda stream: stream or Stream(),
        "is_current_stream_capturing": lambda: state.capturing, "get_allocator_backend": lambda: state.allocator,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda value, device=None: None,
        "is_bf16_supported": lambda including_emulation=True: card.capability >= (8, 0) or including_emulation,
    }

    def counted(name, answer):
        def asked(*args, **kwargs):
            state.calls[name] = state.calls.get(name, 0) + 1
            return answer(*args, **kwargs)
        return asked
    for name, answer in answers.items():
        getattr(torch.cuda, name)  # what torch does not have is not stood in for
        setattr(torch.cuda, name, counted(name, answer))
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.memory.mem_get_info = torch.cuda.mem_get_info
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = lambda device: None  # a first tensor on the card, made past every mode
    torch._C._ensureCUDADeviceGuardSet()  # torch's own way to name a device that is not there
    return state


def _from_host(make):
    """torch.tensor and its like, which go to the device past every mode."""
    @functools.wraps(make)
    def made(*args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return make(*args, device=device, **kwargs)
        return make(*args, **kwargs).to(CARD)
    return made


def _in_every_thread():
    run = threading.Thread.run

    def with_mode(self):
        with Mode():
            run(self)
    threading.Thread.run = with_mode
    Mode().__enter__()


def kernels_take_cards_tensors():
    """Triton's launcher, in the interpreter: it copies from and to the device, which here is the host."""
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    launch = interpreter.GridExecutor.__call__

    def host(value):
        if isinstance(value, TensorDescriptor):
            return TensorDescriptor(host(value.base), value.shape, value.strides, value.block_shape, *([value.padding]
                                    if hasattr(value, "padding") else []))
        return value.host if isinstance(value, OnCard) else value

    def call(self, *args, **kwargs):
        return launch(self, *map(host, args), **{name: host(value) for name, value in kwargs.items()})
    interpreter.GridExecutor.__call__ = call
