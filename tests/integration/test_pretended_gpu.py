"""Runs on a pretended GPU: everything lies where it must, and the host waits where it may."""

import copy
import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import plain_norm
import pytest
import torch
import torch.distributed as dist
from pretended_gpu import MOST_BLOCKS, GpuError, memory, pretended_gpu
from torch import nn
from two_ranks import TINY, StopRunError, in_processes, stop_at, tiny_run

from core import distributed
from core.__main__ import main
from core.config import load
from core.data import Split
from core.diffusion import ema, loss, unet
from core.diffusion.denoiser import build_denoiser
from core.diffusion.loss import Draws
from core.errors import ConfigError
from core.generation import draw
from core.generation.png import write_grid
from core.pipeline import identity
from core.pipeline import run as pipeline
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms import convolution_gradients, dp_sgd, kernels, per_example_gradients
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.plan.releases import DpSgdPlan
from core.training import stages
from core.training.physical_batch import PhysicalBatches
from sweep.driver.doctor import usable_gpus
from sweep.trials.ray_train import use_own_device

CONFIGS = Path(pipeline.__file__).parents[1] / "configs"
FREQUENCY = {
    "frequency.num_features": 50,
    "frequency.num_steps": 2,
    "frequency.batch_size": 20,
    "frequency.num_images": 40,
}
TINIER = {
    "private_training.expected_batch_size": 20,
    "training.num_steps": 4,
    "sampler.num_steps": 2,
    "runtime.num_pictures": 0,
}
BFLOAT16 = {"training.precision": "bfloat16", "sampler.precision": "bfloat16"}
LAST = {"runtime.channels_last": True}
MOMENTS = {"central_images.kind": "moments", "central_images.num_components": 4}
NCSNPP = {"model.layout": "ncsnpp", "model.channel_multipliers": [1, 2]}
EARLY = {"early_scores.at": [0.7], "early_scores.num_images": 40}
RUNS: dict[str, dict[str, Any]] = {
    "dp_feta, all besides": {"training.posthoc_ema": True, "runtime.num_pictures": 1},
    "dp_feta in bfloat16": BFLOAT16 | {"sampler.name": "ddim", "sampler.guidance": 2.0},
    "dp_feta, channels last": LAST | EARLY | {"sampler.s_churn": 10.0},
    "dp_feta in both": BFLOAT16 | LAST | NCSNPP,
    "dp_feta of modes": {"central_images.kind": "mode", "warm_up.augmentation": "rand_augment"},
    "dp_feta from moments": MOMENTS | LAST,
    "dpdm": {"method": "dpdm"} | LAST,
    "dpdm in bfloat16": {"method": "dpdm", "private_training.optimizer": "adam_bc"} | BFLOAT16,
    "feta_pro": {"method": "feta_pro", "privacy.target_epsilon": 3.0} | FREQUENCY,
    "feta_pro in both": {"method": "feta_pro", "privacy.target_epsilon": 3.0}
    | (FREQUENCY | BFLOAT16 | LAST),
    "non_private": {"method": "non_private"} | BFLOAT16,
    "non_private, channels last": {"method": "non_private"} | LAST,
    "moments": {"method": "moments", "central_images.num_components": 4},
    "dp_merf": {"method": "dp_merf"} | FREQUENCY,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_computes_on_the_gpu(tmp_path, name):
    with pretended_gpu() as gpu:
        result = tiny_run(tmp_path, **TINIER | RUNS[name])[-1]
    assert result["stage"] == "done"
    assert gpu.operations > 500
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["device"] == "cuda"
    assert environment["device_name"] == "pretended"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    with pretended_gpu():
        tiny_run(folder, **TINIER, **{"training.posthoc_ema": True})
    return folder


def test_a_run_goes_on_where_it_was_killed_on_a_gpu_and_on_no_other_device(run, tmp_path):
    often = {"runtime.checkpoint_every": 1, "runtime.log_every": 1}
    settings = TINIER | often | {"training.posthoc_ema": True}
    with pretended_gpu():
        for step in (1, 3):  # In either stage.
            with pytest.raises(StopRunError):
                tiny_run(tmp_path, stop_at(step), **settings)
    with pytest.raises(ConfigError, match="device cuda -> cpu"):
        tiny_run(tmp_path, **settings)
    with pretended_gpu():
        tiny_run(tmp_path, **settings)
    whole, again = (torch.load(folder / "model.pt") for folder in (run, tmp_path))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_follows_a_run_computes_on_the_gpu(run, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    drawing = ["--num-images", "12", "sampler.num_steps=3"]
    commands = (
        ["generate", "--run-dir", run, "--out", tmp_path / "1.npz", *drawing],
        ["generate", "--run-dir", run, "--out", tmp_path / "2.npz", "--ema-length=0.1", *drawing],
        ["evaluate", "--run-dir", run],
        ["inspect", "--run-dir", run, "--max-images", "60"],
        ["release", "--run-dir", run, "--out", bundle],
        ["generate", "--bundle", bundle, "--out", tmp_path / "3.npz", *drawing],
    )
    for command in commands:
        with pretended_gpu() as gpu:
            assert main([str(word) for word in command]) == 0, capsys.readouterr().err
        assert gpu.operations > 100 or command[0] == "release"


def rank_on_gpu(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pretended_gpu():
        reports = tiny_run(
            folder / "run", **TINIER, method="dpdm", **{"runtime.cache": f"{folder}/cache"}
        )
    torch.save(reports[-1], folder / f"rank_{rank}.pt")
    distributed.leave()


def test_two_ranks_reduce_on_the_gpu_and_send_no_tensor_of_it_as_an_object(tmp_path):
    assert in_processes(rank_on_gpu, (0, tmp_path), (1, tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["stage"] == "done"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_no_preset_asks_for_more_blocks_than_a_launch_takes(name, tmp_path):
    config = load(CONFIGS / f"{name}.yaml", {"runtime.cache": str(tmp_path)})
    sizes, copies = config.dataset, config.private_training.noise_multiplicity
    with pretended_gpu("meta") as gpu:
        count = PhysicalBatches(config, "cuda").size
        shape = (sizes.channels, sizes.image_size, sizes.image_size)
        drawn = torch.empty(count, copies, device="cuda")
        draws = Draws(drawn, torch.empty(count, copies, *shape, device="cuda"), drawn)
        network = PerExampleGradients(build_denoiser(config).to("cuda"), copies)
        images = torch.empty(count, *shape, device="cuda")
        labels = torch.zeros(count, dtype=torch.long, device="cuda")
        stages._loss(config, network, None, images, labels, draws).sum().backward()
    assert gpu.operations > 1000


def exercise(folder: Path, size: int = 8, **changes: object) -> int:
    """A step of either stage, averages, a picture; returns the parts of the DP-SGD step."""
    settings = TINY | {
        "private_training.max_physical_batch_size": size,
        "private_training.expected_batch_size": 30,
        "runtime.cache": str(folder),
        "warm_up.batch_size": 4,
    }
    config = load({}, settings | changes)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=generator)
    split = Split(images.byte(), torch.arange(60) % 10)
    denoiser = build_denoiser(config).to("cuda")
    average = ema.Ema(denoiser, 0.9)
    data = [stages.WarmUpData(1, torch.rand(10, 1, 8, 8), torch.arange(10))]
    stages.warm_up_stage(config, denoiser, data).step(0)
    plan = DpSgdPlan(1, 0.5, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=30)
    masks, noise = KeyedStream(b"m" * 32), KeyedStream(b"n" * 32)
    parts = []
    accumulate = DpSgdOptimizer.accumulate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DpSgdOptimizer, "accumulate", lambda self: (parts.append(1), accumulate(self))
        )
        stages.private_stage(config, denoiser, split, plan, masks, noise, lambda _: None).step(0)
    average.update(denoiser)
    labels = torch.arange(4)
    drawn = draw.draw_images(average.module, labels, config, 0, 0, "cuda")
    write_grid(folder / "grid.png", drawn, labels)
    return len(parts)


def waits_of_a_part(folder: Path) -> tuple[float, set[str]]:
    """How often the host waits for each further part of a batch, and where."""
    found = []
    for size in (8, 2):
        with pretended_gpu() as gpu:
            found.append((exercise(folder, size), gpu.waits))
    (few, waits_of_few), (many, waits_of_many) = found
    assert many > few > 1
    more = waits_of_many - waits_of_few
    return more.total() / (many - few), set(more)


@pytest.mark.parametrize("share", [stages._RESIDENT, 0.0])
def test_the_host_waits_in_no_part_of_a_batch(tmp_path, monkeypatch, share):
    monkeypatch.setattr(stages, "_RESIDENT", share)  # The data set lies on the GPU, or does not.
    waits, places = waits_of_a_part(tmp_path)
    assert waits == 0, places


def test_one_call_draws_for_a_part_where_kernels_are_right(tmp_path, monkeypatch):
    draws_kernel = pytest.importorskip("core.diffusion.draws_kernel")
    norm_kernel = pytest.importorskip("core.diffusion.norm_kernel")
    drawn_for: list[int] = []

    def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
        drawn_for.append(len(keys))
        return torch.ones(len(keys), count, device=keys.device)

    monkeypatch.setattr(draws_kernel, "normal", normal)
    monkeypatch.setattr(norm_kernel, "forward", plain_norm.forward)
    monkeypatch.setattr(norm_kernel, "backward", plain_norm.backward)
    monkeypatch.setattr(kernels, "kernels_are_right", lambda _: True)
    monkeypatch.setattr(convolution_gradients, "by_kernel", convolution_gradients.shifted)
    waits, places = waits_of_a_part(tmp_path)
    assert waits == 0, places
    assert drawn_for.count(8) > 1
    assert drawn_for.count(2) > 4
    assert identity.computed_by(load({}, {"runtime.device": "cpu"}))["kernels"] == "torch"
    with pretended_gpu():
        there = identity.computed_by(load({}, {"runtime.device": "cuda"}))["kernels"]
        without = load({}, {"runtime.device": "cuda", "runtime.fused_kernels": False})
        assert there.startswith("triton ")
        assert identity.computed_by(without)["kernels"] == "torch"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_are_drawn_by_the_kernel_of_norms_where_it_is_right(precision, monkeypatch):
    norm_kernel = pytest.importorskip("core.diffusion.norm_kernel")
    low, given = precision == "bfloat16", Counter[tuple[torch.dtype, bool]]()

    def forward(x: torch.Tensor, *arguments: Any) -> Any:
        given[x.dtype, arguments[-1]] += 1
        return plain_norm.forward(x, *arguments)

    monkeypatch.setattr(norm_kernel, "forward", forward)
    monkeypatch.setattr(kernels, "kernels_are_right", lambda _: True)
    settings = {"model.attention_sizes": [8], "sampler.num_steps": 2, "sampler.name": "ddim"}
    settings = TINY | settings | {"sampler.precision": precision, "runtime.device": "cuda"}
    drawn, labels = list[torch.Tensor](), torch.arange(4)
    for fused in (True, False):
        config = load({}, settings | {"runtime.fused_kernels": fused})
        with pretended_gpu():
            network = build_denoiser(config)
            for parameter in network.parameters():  # The last layers begin at zero.
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
            network = network.to("cuda")
            drawn.append(draw.draw_images(network, labels, config, 0, 0, "cuda").int())
            norms = sum(isinstance(layer, nn.GroupNorm) for layer in network.modules())
            assert not any("with_silu" in vars(layer) for layer in network.modules())
    assert given.total() == 2 * norms  # An evaluation each of two steps, and none without.
    assert {dtype for dtype, _ in given} == {torch.bfloat16 if low else torch.float32}
    assert {silu for _, silu in given} == {True, False}
    assert (drawn[0] - drawn[1]).abs().max() <= (8 if low else 1)


def test_the_host_waits_in_no_step_of_the_sampler(monkeypatch):
    monkeypatch.setattr(kernels, "kernels_are_right", lambda _: False)  # Asked once in a process.
    denoiser, found = build_denoiser(load({}, TINY)), list[int]()
    for steps in (3, 6):
        config = load({}, TINY | {"sampler.num_steps": steps, "sampler.s_churn": 10.0})
        with pretended_gpu() as gpu:
            network = copy.deepcopy(denoiser).to("cuda")
            draw.draw_images(network, torch.arange(4), config, 0, 0, "cuda")
            found.append(gpu.waits.total())
    assert found[0] == found[1]


def test_few_calls_clip_many_small_gradients_to_the_same_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 5), (60,), (2, 2, 2)] * 10
    plan = DpSgdPlan(1, 0.5, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=5)
    rows = [torch.randn(5, *shape, generator=generator) for shape in shapes]
    rows[3][2] = torch.nan  # Of an example that then counts as zero.

    def summed(device: str) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        optimizer = DpSgdOptimizer(torch.optim.SGD(parameters, 1.0), plan, KeyedStream(b"n" * 32))
        for _ in range(2):
            for parameter, row in zip(parameters, rows, strict=True):
                parameter.grad_sample = row.to(device)
            optimizer.accumulate()
        return [parameter.summed_grad for parameter in parameters]

    expected, found, calls = summed("cpu"), dict[int, list[torch.Tensor]](), []
    for joined in (0, 200, 2**22):  # None, those of fewer values than 40, all.
        monkeypatch.setitem(dp_sgd._JOINED, "cuda", joined)
        with pretended_gpu() as gpu:
            found[joined] = summed("cuda")
            calls.append(gpu.operations)
            found[joined] = memory(found[joined])
        for one, other in zip(found[joined], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert calls[0] > calls[1] > calls[2]


def test_tf32_reaches_neither_clipping_nor_noise(monkeypatch):
    """Where products of float32 are rounded to TF32, no clipped example exceeds the bound."""
    plan = DpSgdPlan(1, 0.5, noise_multiplier=1e-12, max_grad_norm=1.0, expected_batch_size=1)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1, 1000, generator=generator)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pretended_gpu():
        parameter = nn.Parameter(torch.zeros(1000, device="cuda"))
        optimizer = DpSgdOptimizer(torch.optim.SGD([parameter], 1.0), plan, KeyedStream(b"n" * 32))
        parameter.grad_sample = gradient.to("cuda")
        optimizer.accumulate()
        optimizer.release(0)
        product = memory(gradient.T.to("cuda") @ torch.ones(1, 1, device="cuda"))
    assert not torch.equal(product, gradient.T)  # So rough are products of float32.
    assert memory(parameter.detach()).double().norm() == pytest.approx(1.0, abs=1e-7)


def test_the_doctor_asks_a_node_for_its_gpus(monkeypatch):
    with pretended_gpu():
        usable_gpus(1, bfloat16=True)
        with pytest.raises(ConfigError, match="sees 1 of 2 GPUs: install the driver"):
            usable_gpus(2, bfloat16=True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        usable_gpus(1, bfloat16=False)
        with pytest.raises(ConfigError, match=r"GPU 0 \(pretended\) has no bfloat16: set"):
            usable_gpus(1, bfloat16=True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 80 * 2**30))
        with pytest.raises(ConfigError, match=r"GPU 0 \(pretended\) has 1.0 of 80.0 GiB free"):
            usable_gpus(1, bfloat16=False)
    with pytest.raises(ConfigError, match="sees 0 of 1 GPUs"):
        usable_gpus(1, bfloat16=False)


@pytest.mark.parametrize(("gpus", "fraction"), [(1, None), (0.5, 0.5 - 1 / 80), (0, None)])
def test_a_worker_takes_the_gpu_that_it_was_given_and_no_more_of_it(monkeypatch, gpus, fraction):
    taken: list[Any] = []
    with pretended_gpu():
        monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda", 1))
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        limit = "set_per_process_memory_fraction"
        monkeypatch.setattr(torch.cuda, limit, lambda share, _: taken.append(share))
        use_own_device(gpus)
    assert taken == [torch.device("cuda", 1), fraction][: bool(gpus) + (fraction is not None)]
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    if gpus:
        with pytest.raises(ConfigError, match=r"sees no GPU, but gpus_per_worker="):
            use_own_device(gpus)


def plant(patch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str) -> None:
    """Replaces one text of a function of `core`, whose lines stay where they are."""
    file = Path(inspect.getsourcefile(function) or "")
    text = file.read_text()
    assert text.count(old) == 1
    code = compile(text.replace(old, new), str(file), "exec")
    for name in function.__qualname__.split("."):
        inner = [each for each in code.co_consts if isinstance(each, CodeType)]
        (code,) = (each for each in inner if each.co_name == name)
    patch.setattr(function, "__code__", code)


BUFFER = """self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0.0, 7.0, base)) * 0.25, persistent=False
        )"""
TOTAL = "total = torch.zeros((), device=device)\n        chosen"
MISTAKES = {
    "noise left on the CPU": (
        *(DpSgdOptimizer.add_noise, ".to(flat.device)", ""),
        r"two devices: aten.\w+ .*privacy/mechanisms/dp_sgd.py:\d+",
    ),
    "labels left on the CPU": (
        *(stages.resident, "split.labels.to(device)", "split.labels"),
        r"two devices: aten.index .*core/training/stages.py:\d+",
    ),
    "records of a large data set left on the CPU": (
        *(stages.chosen_records, "each[part].to(device, non_blocking=True)", "each[part]"),
        r"two devices: .*core/diffusion/loss.py:\d+",
    ),
    "a generator of the CPU": (
        *(loss.draw, "torch.Generator(device)", "torch.Generator()"),
        r"normal_ on cuda with a generator of cpu, at core/diffusion/loss.py:\d+",
    ),
    "draws on the CPU": (
        *(loss.draw, "copies * entries), device=device)", "copies * entries))"),
        r"normal_ on cpu with a generator of cuda, at core/diffusion/loss.py:\d+",
    ),
    "the sum of losses on the CPU": (
        *(stages.private_stage, TOTAL, TOTAL.replace(", device=device", "")),
        r"two devices: aten.add_ of .*core/training/stages.py:\d+",
    ),
    "pictures that stay on the GPU": (
        *(draw.draw_images, ".round().to(torch.uint8).cpu()", ".round().to(torch.uint8)"),
        r"core/generation/png.py:\d+",
    ),
    "averages on the CPU": (
        *(ema.Ema.__init__, "copy.deepcopy(module)", "copy.deepcopy(module).cpu()"),
        r"two devices: aten._foreach_lerp_ .*core/diffusion/ema.py:\d+",
    ),
    "a constant that is no buffer": (
        *(unet.UNet.__init__, BUFFER, "self.frequencies = torch.exp(torch.linspace(0, 7, base))"),
        r"two devices: aten.mul of .*core/diffusion/unet.py:\d+",
    ),
    "channels-last input of group norm": (
        *(per_example_gradients._GroupNorm.forward, 'x if x.device.type == "cpu"', "x if True"),
        r"Expected X.is_contiguous.*core/privacy/mechanisms/per_example_gradients.py:\d+",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_its_line(name, tmp_path, monkeypatch):
    function, old, new, message = MISTAKES[name]
    plant(monkeypatch, function, old, new)
    if "large" in name:
        monkeypatch.setattr(stages, "_RESIDENT", 0.0)
    with pretended_gpu(), pytest.raises(GpuError, match=message):
        exercise(tmp_path, **LAST)


def test_a_value_that_is_read_in_each_part_is_counted(tmp_path, monkeypatch):
    old = "return loss.detach()\n\n        for loss in batches.run(compute, share, give_up=per"
    plant(monkeypatch, stages.private_stage, old, old.replace("detach()", "item()"))
    assert waits_of_a_part(tmp_path)[0] == 1


def test_more_groups_than_a_launch_takes_are_refused(monkeypatch):
    layer = nn.GroupNorm(2, 4)
    images = MOST_BLOCKS // 2 + 1
    for most, refused in ((per_example_gradients._MOST_GROUPS, False), (10**9, True)):
        monkeypatch.setattr(per_example_gradients, "_MOST_GROUPS", most)
        with pretended_gpu():
            network = PerExampleGradients(layer.to("cuda"), 1)
            out = network(torch.randn(images, 4, 1, 1, device="cuda")).sum()
            if refused:
                with pytest.raises(GpuError, match=r"65536 blocks .*per_example_gradients.py:\d+"):
                    out.backward()
            else:
                out.backward()
            network.remove_hooks()


def test_a_tensor_of_the_gpu_is_no_object_to_send(tmp_path):
    with pretended_gpu(), pytest.raises(GpuError, match="pickled"):
        distributed.all_gather_object(torch.zeros(1, device="cuda").__reduce_ex__(2))
