"""What a GPU punishes and Triton's interpreter lets pass, checked in every launch of the interpreter."""

import inspect
from contextlib import contextmanager

import numpy as np
import torch

SPACE = 44  # bits of address an argument has to itself: no overrun reaches another one


def tensors(name, x):
    if hasattr(x, "data_ptr"):
        yield name, x
    elif hasattr(x, "block_shape"):  # a descriptor
        yield name, x.base
    elif isinstance(x, tuple):
        for i, each in enumerate(x):
            yield from tensors(f"{name}[{i}]", each)


class Memory:
    """Stands between the interpreter and memory, for the tensors of one launch.

    An argument's pointers start at an address of its own, so every access is known to come from it; it must
    be aligned and between the argument's first and last element. Programs run at once on a GPU: none may
    touch an element that another one writes.
    """

    def __init__(self, actual, builder):
        self.actual, self.builder = actual, builder

    def __getattr__(self, name):  # the enumerations
        return getattr(self.actual, name)

    def launch(self, kernel, arguments, grid):
        self.kernel, self.arguments, self.index = kernel, [], {}
        assert max(grid[1:], default=0) < 1 << 16, (kernel, grid)
        shadows = {}  # of every storage byte: which program has written it, and which has read it
        for name, x in (found for argument in arguments.items() for found in tensors(*argument)):
            storage = x.untyped_storage()
            if storage.data_ptr() not in shadows:
                shadows[storage.data_ptr()] = np.full((2, storage.nbytes()), -1)
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            size = (last + 1) * x.element_size() if x.numel() else 0
            shadow = shadows[storage.data_ptr()][:, x.storage_offset() * x.element_size() :]
            self.index[id(x)] = len(self.arguments)
            self.arguments.append((name, x, size, shadow))

    def address(self, x):
        return (self.index[id(x)] + 1 << SPACE) + x.data_ptr() % 4096

    def real(self, pointers, mask, writes):
        """Addresses in memory of what the interpreter takes for addresses."""
        pointers, live = np.broadcast_arrays(pointers, np.asarray(mask).astype(bool))
        found, out = np.unique(pointers[live] >> SPACE), np.zeros(pointers.shape, np.uint64)
        x, y, z = self.builder.grid_idx
        program = (x * self.builder.grid_dim[1] + y) * self.builder.grid_dim[2] + z
        for i in found.tolist():
            here = live & (pointers >> SPACE == i)
            where = f"{self.kernel}, program {x, y, z}"
            assert 0 < i <= len(self.arguments), f"{where}: a pointer far outside every argument"
            name, tensor, size, (written, read) = self.arguments[i - 1]
            at = (pointers[here] - np.uint64(self.address(tensor))).astype(np.int64)
            each = tensor.element_size()
            wrong = at[(at < 0) | (at + each > size) | (at % each != 0)] / each
            what = f"{where}: {name} {[*tensor.shape]}"
            assert not len(wrong), f"{what} at {wrong[0]:g} of {size // each} elements"
            others = np.setdiff1d(written[at], (-1, program))
            if writes:
                assert len(np.unique(at)) == len(at), f"{what} is written twice at once"
                others = np.append(others, np.setdiff1d(read[at], (-1, program)))
                written[at] = program
            else:
                read[at] = np.where((read[at] == -1) | (read[at] == program), program, -2)
            assert not len(others), f"{what} races with program {others[0]:g}"
            out[here] = np.uint64(tensor.data_ptr()) + at.astype(np.uint64)
        return out

    def load(self, pointers, mask, *rest):
        return self.actual.load(self.real(pointers, mask, False), mask, *rest)

    def store(self, pointers, value, mask):
        return self.actual.store(self.real(pointers, mask, True), value, mask)

    def atomic_rmw(self, *_):
        raise NotImplementedError("no kernel needs atomics yet")

    atomic_cas = atomic_rmw


@contextmanager
def checked(monkeypatch):
    """Checks all launches meanwhile, and fills new tensors with NaN."""
    from triton.runtime import interpreter

    memory = Memory(interpreter._interpreter, interpreter.interpreter_builder)
    convert, to_host = interpreter._implicit_cvt, interpreter.GridExecutor._init_args_hst

    def address(x):
        if not hasattr(x, "data_ptr"):
            return convert(x)
        ty = interpreter.tl.str_to_ty(interpreter.triton.runtime.jit.mangle_type(x), None)
        handle = interpreter.TensorHandle(np.array([memory.address(x)], np.uint64), ty)
        return interpreter.tl.tensor(handle, ty)

    def launch(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        memory.launch(self.fn.__name__, inspect.getcallargs(self.fn, *args, **kwargs), self.grid)
        return args, kwargs

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        patch.setattr(interpreter, "_implicit_cvt", address)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", launch)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
