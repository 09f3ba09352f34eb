"""Counted memory against closed forms, against PyTorch's own allocator, and on a GPU against what it used."""
import functools
import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from sevlm import SEVLM
from support.device import autocast
from support.memory import live_bytes, peak_bytes, python_peak, step_memory
from train import made_up_batch

INNER, WIDTH = 300, 50


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, INNER, bias=False), nn.ReLU(), nn.Linear(INNER, WIDTH, bias=False))


def step_of(model: nn.Module, items: int) -> None:
    model(torch.ones(items, WIDTH)).sum().backward()


def sevlm_loss(model: SEVLM, items: int) -> torch.Tensor:
    pictures, data = made_up_batch(model, items, "the quiet sea " * 10, model.config.length)
    return model(pictures, **data).losses["total"]


def sevlm_step(model: SEVLM, items: int, dtype: torch.dtype) -> None:
    with autocast(model.device, dtype):
        sevlm_loss(model, items).backward()


def allocated(run, folder) -> int:
    """The most that a call has allocated at once, as the allocator itself tells the profiler."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


@pytest.mark.parametrize("items", [1, 10, 1000])
def test_two_layers_by_hand(items):
    model = two_layers()
    weight = 4 * WIDTH * INNER  # bytes of each
    narrow, wide = 4 * WIDTH * items, 4 * INNER * items  # bytes of a tensor outside and between the layers
    relu_backward = narrow + wide + weight + 2 * wide  # input, ReLU's result, a weight's gradient, the middle's two
    end = narrow + wide + 2 * weight  # input, the middle's gradient, both weights' gradients
    expected = 2 * weight + 4 * weight + max(relu_backward, end)  # with the weights themselves and AdamW's moments
    assert step_memory(lambda n: step_of(model, n), model)(items) == pytest.approx(expected, abs=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"train_tower": True}, {"dropout": 0.0, "contrastive_head": False}], ids=str)
def test_a_model_as_the_allocator_knows_it(make_model, tmp_path, changes, dtype):
    model = make_model(**changes).train()
    step = functools.partial(sevlm_step, model, dtype=dtype)
    without_step = step_memory(step, model, kept_by_optimizer=0)(9) - sum(p.nbytes for p in model.parameters())
    step(2)  # what is allocated once
    model.zero_grad()
    assert without_step == pytest.approx(allocated(lambda: step(9), tmp_path), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass(make_model, dtype):
    """After the forward pass nothing is left but what autograd itself says that it saves."""
    model = make_model().train()
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept, losses = {}, []

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(model.device, dtype):
        loss = sevlm_loss(model, 5)
    expected = sum(storage.nbytes() for address, storage in kept.items() if address not in known)

    def forward():
        with autocast(model.device, dtype):
            losses.append(sevlm_loss(model, 5))
        torch.ones(1)  # an op after all that the forward pass only needs for itself has gone
    assert live_bytes(forward)[-1] == pytest.approx(expected, rel=0.01)
    assert loss.requires_grad


def test_the_optimizer_keeps_two_moments_of_what_is_trained():
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    step_of(model, 3)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    needs = [step_memory(lambda n: step_of(model, n), model, kept_by_optimizer=copies)(5) for copies in (0, 2)]
    assert needs[1] - needs[0] == kept > 0


def test_counting_leaves_no_trace(make_model):
    model = make_model(dropout=0.5).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step_memory(functools.partial(sevlm_step, model, dtype=torch.float32), model)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_share_memory_count_once():
    def run():
        x = torch.ones(1000)
        y = [x.view(10, 100), x[5:], x.add_(1)]
        del x
        return torch.cat([y[0].flatten(), y[1]])
    assert peak_bytes(run) == 4 * (1000 + 1995)


def test_what_python_and_numpy_hold():
    assert python_peak(lambda: [np.zeros(10_000) for _ in range(3)]) == pytest.approx(240_000, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_uses_what_was_counted(make_model, dtype):
    model = make_model(width=256, tower_width=256).cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    counted = step_memory(functools.partial(sevlm_step, model, dtype=dtype), model)(64)
    for _ in range(2):  # the second has the optimizer's moments from the start
        torch.cuda.reset_peak_memory_stats()
        sevlm_step(model, 64, dtype)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() == pytest.approx(counted, rel=0.15)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="only glibc is asked to")
def test_freed_memory_is_kept_for_the_next_step():
    """What the system clears anew shows as page faults: 64 MB are 16,384 of them."""
    code = """
import resource, torch
from support.device import choose_device
choose_device("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(24)])
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert np.median(json.loads(told)[12:]) < 1000  # once the allocator has found its places
