"""How much memory a training step needs, counted from two small steps, on a machine that need not have so much.

Each tensor that a step makes is followed from the op that makes it until nobody holds it: inputs, what is kept for the
backward pass, gradients, temporaries. At any moment of a step their bytes grow linearly with its items (pictures, say),
so two small steps tell them for a step of any size. Their largest sum, with the weights and what the optimizer keeps,
is what the step needs. It is not linear itself: a small step needs most at its end, when all gradients are there, and a
large one where its largest tensors meet.

Not counted: what a kernel takes for itself, and what an allocator leaves unused. The gradients of a weight that is used
several times are summed in place, but not while they are watched: in a small step this may count one of them too much.
"""
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FEW = 2  # items of the smaller step: a step of one does less, since a batch of one needs fewer copies


def step_memory(step: Callable[[int], object], model: nn.Module, kept_by_optimizer: int = 2) -> Callable[[int], int]:
    """The bytes that a training step needs, as a function of its items.

    `step(n)` computes the gradients of n items. For each number in a trained weight the optimizer keeps two: AdamW's
    moments. The model is left without gradients, and PyTorch's random state as it was.
    """
    weights = list(model.parameters())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    fixed = sum(tensor.nbytes for tensor in (*weights, *model.buffers())) + kept_by_optimizer * trained
    few, more = (gradient_moments(step, items, model) for items in (FEW, FEW + 1))
    growth = [after - before for before, after in zip(few, more, strict=True)]  # by one item, at each moment
    return lambda items: fixed + max(some + (items - FEW) * each for some, each in zip(few, growth, strict=True))


def gradient_moments(step: Callable[[int], object], items: int, model: nn.Module) -> list[int]:
    """`live_bytes` of a step without a trace."""
    gpus = {weight.device.index for weight in model.parameters() if weight.is_cuda}
    with torch.random.fork_rng(gpus):
        model.zero_grad()
        moments = live_bytes(lambda: step(items))
        model.zero_grad()
    return moments


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that the tensors made by a call take at once."""
    return max(live_bytes(run), default=0)


def live_bytes(run: Callable[[], object]) -> list[int]:
    """How many bytes the tensors made by a call take, after each of its ops."""
    with Follower() as follower:
        run()
    return follower.moments


def python_peak(run: Callable[[], object]) -> int:
    """The same for what Python and numpy make: the most bytes at once during a call."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


class Follower(TorchDispatchMode):
    """Is shown every op, those of the backward pass too. Tensors may share memory, so storages are what it follows."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, weakref.ref] = {}  # by address
        self.live, self.moments = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in storages([args, list(kwargs.values())]):
            self.follow(storage, 0)  # a new one here, a weight for example, was there before
        result = op(*args, **kwargs)
        for storage in storages([result]):
            self.follow(storage, storage.nbytes())
        self.moments.append(self.live)
        return result

    def follow(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage.data_ptr()
        if address not in self.known:
            self.known[address] = weakref.ref(storage, lambda _: self.release(address, size))
            self.live += size

    def release(self, address: int, size: int) -> None:
        del self.known[address]
        self.live -= size


def storages(values: Iterable) -> Iterator[torch.UntypedStorage]:
    """Of all tensors among an op's arguments or results, which may be lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from storages(value)
