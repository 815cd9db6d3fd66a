"""`make gpu` runs where no test of ours does: what can be tried of it on a processor is tried here."""

import re
from dataclasses import replace

import pytest
import torch

from scripts import gpu
from tests.pretended_device import PretendedDevice

# Four bits of normal numbers: the mean square error is about 0.009 of their variance.
NF4_ERROR = (0.05, 0.15)


def test_the_full_shape_is_the_16b_s():
    assert gpu.parameters_of(gpu.FULL) == 16_375_728_128


def test_packed_and_unpacked_models_are_made_of_the_same_numbers():
    plain, packed = gpu.random_model(gpu.TINY, "cpu"), gpu.random_model(gpu.TINY, "cpu", "nf4")
    layer = plain.moe_layers[-1]
    for name in ("W_in", "W_out"):
        exact, near = (getattr(model, name)[layer].float() for model in (plain, packed))
        assert NF4_ERROR[0] < (near - exact).norm() / exact.norm() < NF4_ERROR[1]
    assert torch.equal(plain.W_router[layer], packed.W_router[layer])
    tokens = torch.arange(12)[None]
    for model in (plain, packed):
        logits = model(tokens)
        assert logits.isfinite().all() and logits.dtype == torch.bfloat16
        assert not torch.equal(logits[:, -1], model(tokens.flip(1))[:, -1]), "positions count: rotary tables are real"


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_everything_is_on_the_device_that_is_named(capability, monkeypatch):
    """There is none here: one is pretended, which refuses what a GPU refuses. The second is older than grouped_mm."""
    new = capability >= (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    scale = replace(gpu.DRY, device="cuda", study_tokens=200, batch=(2, 8))
    with torch.no_grad(), PretendedDevice() as pretended:
        model = gpu.random_model(gpu.TINY, "cuda", None if new else "nf4")
        inner = model.original_model
        assert {value.device.type for value in (*inner.parameters(), *inner.buffers())} == {"cuda"}
        with pytest.raises(RuntimeError, match="to be on the same device, found cuda:0 and cpu"):
            model.original_model(torch.zeros(1, 4, dtype=torch.long))
        model(torch.zeros(1, 4, dtype=torch.long))  # ours moves them
        assert "tokens/s" in gpu.speed(model, scale)
        assert new == any("grouped_mm" in name for name in pretended.called)
        if new:
            assert re.match(r"[\d,]+ tokens of 5 domains", gpu.study(model, scale))


def test_the_table_has_every_step_and_says_what_failed(monkeypatch, capsys):
    def broken(scale: object) -> str:
        raise RuntimeError("the reason")

    monkeypatch.setattr(gpu, "tests", lambda: "2 passed")
    monkeypatch.setattr(gpu, "forward", broken)
    assert gpu.main(["--dry"]) == 1
    said = capsys.readouterr().out
    table = said[said.index("\n\nstep") :]
    tests, products = "gpu tests .* 2 passed", "forward.py.*FAILED: RuntimeError"
    for row in (tests, products, "shape, bfloat16 .*tokens/s.*routing study: 2,", "shape, nf4 .*tokens/s"):
        assert re.search(row, table), row
    assert "the reason" in table


def test_without_a_device_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "there is no CUDA device; --dry runs the same code on the processor\n"
