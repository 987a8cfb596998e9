"""The kernel that draws for many examples: interpreted on the CPU, compiled without a GPU."""
# ruff: noqa: E402

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from checks import is_normal
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from core.diffusion import draws_kernel

ROOT = Path(__file__).resolve().parents[2]
IDS, OTHER = [4, 2**40, 7], [2**40]
COPIES, SHAPE = 3, (1, 3, 5)
CODE = f"""
import sys, torch
from core.diffusion.draws_kernel import KNOWN, normal
from core.diffusion.loss import draw
def drawn(ids, step):
    return vars(draw("kernel", step, torch.tensor(ids), {COPIES}, {SHAPE}, "cpu", fused=True))
keys = torch.tensor([0, 1, 2**31, 2**32, 2**62 + 5])
examples = [drawn({IDS}, 0), drawn({OTHER}, 0), drawn({OTHER}, 1)]
known = normal(torch.tensor([KNOWN[0]]), len(KNOWN[1]))
torch.save([examples, normal(keys, 40_001), known], sys.argv[1])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Triton decides when it is loaded whether to interpret, its own functions too."""
    path = tmp_path_factory.mktemp("draws") / "draws.pt"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CODE, str(path)], env=env, cwd=ROOT, check=True)
    return torch.load(path)


def test_an_example_draws_the_same_whatever_the_batch(interpreted):
    together, alone, later = interpreted[0]
    assert together["noise"].shape == (len(IDS), COPIES, *SHAPE)
    for name, values in together.items():
        assert torch.equal(values[1], alone[name][0])
        for other in (values[0], values[2], later[name][0]):
            assert not torch.isclose(other, values[1]).any()


def test_the_numbers_are_normal_and_independent(interpreted):
    values = interpreted[1]
    assert is_normal(values.numpy(), 1.0)
    assert is_normal(values.sum(0).numpy() / math.sqrt(len(values)), 1.0)  # Of keys.
    for apart in (1, 2, 3, 4):
        first = torch.arange(len(values[0]) - apart)
        first = first[first // apart % 2 == 0]
        assert is_normal(((values[:, first] + values[:, first + apart]) / 2**0.5).numpy(), 1.0)


def test_the_known_answer_is_that_of_its_key(interpreted):
    torch.testing.assert_close(
        interpreted[2][0], torch.tensor(draws_kernel.KNOWN[1]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_it_compiles_for_a_gpu(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"keys": "*i64", "out": "*fp32", "count": "i32", "block": "constexpr"}
    source = ASTSource(draws_kernel._normal, types, {"block": draws_kernel._BLOCK})
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
