"""The moments' release: bounded records in each sum, their noise, and its charge as one."""

import dataclasses

import pytest
import torch
from by_library import dp_events, epsilon_of
from checks import box_muller, is_normal
from dp_accounting.pld import privacy_loss_distribution
from test_plan_and_release import RELATIONS, SMALL

from core.config import Config, load
from core.data import Split
from core.errors import ConfigError, InfeasibleError
from core.privacy.keys import KeyedStream
from core.privacy.ledger.ledger import events_of
from core.privacy.mechanisms import moments
from core.privacy.mechanisms.moments import (
    cluster_seconds,
    cluster_sums,
    coordinates,
    from_triangle,
    leading,
    mean_sum,
    nearest,
    next_centers,
    reach_of,
    release_moments,
    second_sum,
    to_triangle,
)
from core.privacy.plan.plan import PrivacyPlan, check_stages, make_plan, resumed_plan
from core.privacy.plan.releases import MomentsPlan

CLASSES, NOISE = 3, KeyedStream(b"n" * 32)
TINY = 1e-9
"""What rounding may add to a sensitivity, relative: sums and norms are float64."""
MOMENTS = SMALL | {"central_images.kind": "moments", "central_images.num_components": 4}
CLUSTERS, ROUNDS = 2, 2
PARTS = ("mean", "second", "clusters of round 0", "clusters of round 1", "cluster seconds")


def settings(**changes: object) -> Config:
    """Of 8 x 8 images, in three classes; double underscores for dots."""
    mine = {"dataset.num_classes": CLASSES, "dataset.num_examples": 300, "evaluation.num_images": 6}
    mine |= {"central_images.image_size": 8}
    mine |= {"central_images.num_clusters": CLUSTERS, "central_images.num_rounds": ROUNDS}
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return load({}, MOMENTS | mine | changed)


def plan_of(config: Config) -> MomentsPlan:
    plan = MomentsPlan.of(config)
    assert plan is not None
    return plan


def bounds(plan: MomentsPlan, reach: float | None = None) -> dict[str, tuple[float, float]]:
    """What a record may add to each sum, and the noise of it."""
    reach = reach or plan.max_norm
    of_round = (plan.cluster_norm, plan.round_share)
    parts = [
        (plan.mean_norm, plan.mean_share),
        (plan.max_norm**2, plan.subspace_share),
        *[of_round] * plan.num_rounds,
        (reach**2, plan.second_share),
    ]
    named = zip(PARTS, parts, strict=True)
    return {name: (norm, plan.stddev(norm, share)) for name, (norm, share) in named}


def some_centers(count: int, components: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((CLASSES, count, components), generator=generator, dtype=torch.float64)


def sums_of(
    split: Split,
    config: Config,
    mean: torch.Tensor,
    basis: torch.Tensor,
    centers: torch.Tensor | None = None,
    last: tuple[torch.Tensor, float] | None = None,
):
    """All sums of a release that found these centers after its first round and its last."""
    central, plan, count = config.central_images, plan_of(config), len(basis)
    centers = some_centers(CLUSTERS, count) if centers is None else centers
    points, labels = coordinates(split, mean, basis, central, plan), split.labels
    found = [mean_sum(split, central, plan), second_sum(split, mean, central, plan)]
    for each in (torch.zeros(CLASSES, 1, count, dtype=torch.float64), centers):
        clusters = nearest(points, labels, each)
        found.append(cluster_sums(points, labels, clusters, each, plan))
    last, reach = (centers, plan.max_norm) if last is None else last
    found.append(cluster_seconds(points, labels, clusters, last, reach))
    return dict(zip(PARTS, found, strict=True))


def random_split(count: int, channels: int = 1, seed: int = 0, side: int = 8) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = 255 * torch.rand((count, channels, side, side), generator=generator)
    return Split(images.round().byte(), torch.arange(count) % CLASSES)


def empty_split(config: Config) -> Split:
    dataset = config.dataset
    shape = (0, dataset.channels, dataset.image_size, dataset.image_size)
    return Split(torch.zeros(shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("record", ["black", "white", "halves", "random", "nan", "inf", "huge"])
@pytest.mark.parametrize("max_norm", [None, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_record_moves_each_sum_by_at_most_its_norm(record, max_norm, channels):
    """Two worlds, with a record of each class in turn and without; the others do not hide it."""
    changes = {"dataset__channels": channels, "central_images__image_size": 4}
    config = settings(central_images__max_norm=max_norm, **changes)
    plan, size = plan_of(config), 16 * channels
    assert plan.max_norm == (max_norm or size**0.5)
    everyone = random_split(900, channels)
    images = everyone.images.float()
    odd = {"white": 255.0, "nan": torch.nan, "inf": torch.inf, "huge": 1e20, "black": 0.0}
    if record == "halves":
        images[7:10, :, :, ::2], images[7:10, :, :, 1::2] = 0.0, 255.0
    elif record != "random":
        images[7:10] = odd[record]
    generator = torch.Generator().manual_seed(3)
    mean = torch.rand(size, generator=generator)
    mean[::2], mean[1::2] = 0.0, 1.0  # Extreme, too: what an adversary's neighbours may make.
    basis = leading(torch.cov(torch.rand((size, 50), generator=generator).double()), 4)
    whole = sums_of(Split(images, everyone.labels), config, mean, basis)
    for index in (7, 8, 9):
        others = torch.arange(900) != index
        without = sums_of(Split(images[others], everyone.labels[others]), config, mean, basis)
        for name, (norm, _) in bounds(plan).items():
            moved = whole[name] - without[name]
            assert moved.norm() <= norm * (1 + TINY), name
            assert torch.isfinite(moved).all()
            if name.startswith("cluster"):  # One cluster of its own class, and no other.
                places = (moved.abs().amax(2) > 1e-9).nonzero().tolist()
                assert len(places) <= 1
                assert all(place[0] == index % CLASSES for place in places)
        if record == "white":  # The bounds are tight: no smaller one would do.
            moved = whole["mean"] - without["mean"]
            assert moved.norm() >= plan.mean_norm * (1 - TINY)
            if max_norm is not None:
                moved = whole["second"] - without["second"]
                assert moved.norm() >= plan.max_norm**2 * (1 - TINY)


@pytest.mark.parametrize("max_norm", [None, 1.5])
def test_a_record_in_the_subspace_reaches_the_bounds_of_its_class(max_norm):
    config = settings(central_images__max_norm=max_norm)
    plan, image = plan_of(config), torch.full((1, 1, 8, 8), 255.0)
    basis = torch.eye(64, dtype=torch.float64)[:4]
    basis[0] = 1 / 8  # The direction of white.
    centers = torch.zeros((CLASSES, 2, 1), dtype=torch.float64)
    one = sums_of(Split(image, torch.tensor([2])), config, torch.zeros(64), basis[:1], centers)
    assert one["clusters of round 0"].norm().item() == pytest.approx(plan.cluster_norm)
    assert one["clusters of round 1"].norm().item() == pytest.approx(plan.cluster_norm)
    assert one["cluster seconds"].norm().item() == pytest.approx(plan.max_norm**2)
    assert one["clusters of round 0"][2, 0, 0].item() == pytest.approx(plan.max_norm / 2)


@pytest.mark.parametrize("count", [60, 1_024, 1_025, 2_500])
def test_no_other_record_moves_a_point_by_a_bit(count):
    """Or a cluster could change with the rounding of others, which no bound counts."""
    config, split = settings(), random_split(count)
    plan, mean = plan_of(config), torch.full((64,), 0.5)
    basis = leading(torch.cov(torch.rand((64, 90)).double()), 4)
    points = coordinates(split, mean, basis, config.central_images, plan)
    for index in (0, 7, count - 1):
        others = torch.arange(count) != index
        fewer = Split(split.images[others], split.labels[others])
        found = coordinates(fewer, mean, basis, config.central_images, plan)
        assert torch.equal(found, points[others])


@pytest.mark.parametrize("reach", [1e-3, 0.4, 2.0])
def test_differences_from_clusters_are_clipped_to_their_reach(reach):
    """However far an image is from the mean of its cluster, in the last round or in that before."""
    config, split = settings(), random_split(900)
    split.images[7], split.images[8] = 255, 0
    basis = leading(torch.cov(torch.rand((64, 90)).double()), 4)
    mean, centers = torch.full((64,), 0.5), some_centers(CLUSTERS)
    far = (centers + 3.0, reach)
    whole = sums_of(split, config, mean, basis, centers, far)["cluster seconds"]
    for index in (7, 8, 9):
        others = torch.arange(900) != index
        fewer = Split(split.images[others], split.labels[others])
        moved = whole - sums_of(fewer, config, mean, basis, centers, far)["cluster seconds"]
        assert moved.norm().item() == pytest.approx(reach**2, rel=1e-6)


@pytest.mark.parametrize("noise", [1e-9, 1.0])
def test_the_reach_is_that_of_the_differences_from_clusters(noise):
    """Also under noise, whose part in the means is taken off."""
    config = settings(dataset__num_examples=3_000)
    plan = dataclasses.replace(plan_of(config), noise_multiplier=noise)
    stream = torch.Generator().manual_seed(1)
    means = torch.randn((CLASSES, 2, 4), generator=stream).double()
    counts = torch.tensor([300.0, 700.0]).expand(CLASSES, 2).double()
    within = torch.tensor([0.3, 0.2, 0.1, 0.1]).double()
    mean = (counts[..., None] * means).sum((0, 1)) / 3_000
    spread = (counts[..., None] * (means - mean) ** 2).sum((0, 1)) / 3_000 + within
    stddev = plan.stddev(plan.cluster_norm, plan.round_share)
    found = []
    for _ in range(200):
        drawn = stddev * torch.randn((CLASSES, 2, 5), generator=stream).double()
        sums = torch.cat(
            (plan.count_norm * counts[..., None], counts[..., None] * (means - mean)), 2
        )
        noisy = (sums + drawn)[..., 1:] / counts[..., None]
        found.append(reach_of(noisy, sums, spread, plan))
    squares = torch.tensor(found).square().mean().item()
    assert squares == pytest.approx(1.25**2 * 0.7, rel=0.05)
    assert reach_of(means, sums, 1e9 * spread, plan) == plan.max_norm
    nothing = reach_of(means, 0 * sums, 0 * spread, plan)
    assert nothing == pytest.approx(1e-3 * plan.max_norm)


def test_triangles_keep_norms_and_come_back():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((5, 30), generator=generator, dtype=torch.float64)
    matrices = rows[:, :, None] * rows[:, None, :]
    triangles = to_triangle(matrices)
    assert triangles.shape == (5, 30 * 31 // 2)
    torch.testing.assert_close(triangles.norm(dim=1), rows.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(from_triangle(triangles), matrices, rtol=1e-12, atol=0)


def released_sums(
    monkeypatch: pytest.MonkeyPatch, split: Split, config: Config, noise: KeyedStream = NOISE
) -> dict[str, torch.Tensor]:
    """The noisy sums as the mechanism rounds them, before anything is made of them."""
    kept: dict[str, torch.Tensor] = {}
    float_of = torch.Tensor.float

    def record(values: torch.Tensor) -> torch.Tensor:
        rounded = float_of(values)
        if values.dtype == torch.float64 and len(kept) < len(PARTS):
            kept[PARTS[len(kept)]] = rounded
        return rounded

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", record)
        patch.setattr(moments, "down_scaled", lambda images, _: images.div(255.0))
        found = release_moments(split, CLASSES, config.central_images, plan_of(config), noise)
    return kept | {"reach": found.reach}


def test_noise_has_the_planned_scale_on_every_sum(monkeypatch):
    """On no data, under many keys: of each sum, class and cluster apart."""
    config = settings(
        dataset__image_size=16, central_images__image_size=16, central_images__num_components=256,
        central_images__max_norm=3.0,
    )  # fmt: skip
    plan, empty = plan_of(config), empty_split(config)
    streams = [KeyedStream(number.to_bytes(32, "big")) for number in range(270)]
    drawn = [released_sums(monkeypatch, empty, config, stream) for stream in streams]
    shapes = {name: drawn[0][name].shape for name in PARTS}
    assert list(shapes.values()) == [(256,), (32_896,), (CLASSES, 1, 257), (CLASSES, 2, 257),
                                     (CLASSES, 2, 32_896)]  # fmt: skip
    total = 0.0
    assert {float(kept["reach"]) for kept in drawn} == {plan.max_norm}  # So much variance is noise.
    for name, (norm, stddev) in bounds(plan).items():
        rows = torch.cat([kept[name].view(-1, shapes[name][-1]) for kept in drawn])
        of_each = shapes[name][:-1].numel()
        for label in range(of_each):
            values = rows[label::of_each].flatten()[:200_000].numpy()
            assert is_normal(values, stddev), name
            for wrong in (0.5, 2**-0.5, 0.98, 1.02, 2**0.5, 2.0):
                assert not is_normal(values, wrong * stddev), name
        total += (norm / stddev) ** 2
    assert total == pytest.approx(4.0**-2, rel=1e-9)  # One Gaussian mechanism, all shares paid.
    flat = drawn[0]["cluster seconds"].flatten(0, 1)
    assert (torch.corrcoef(flat) - torch.eye(2 * CLASSES)).abs().max() < 0.04
    rounds = [torch.cat([kept[name][:, 0, 1:].flatten() for kept in drawn]) for name in PARTS[2:4]]
    assert torch.corrcoef(torch.stack(rounds))[0, 1].abs() < 0.01  # Each has noise of its own.


def test_sums_and_noise_are_rounded_once_and_together(monkeypatch):
    config = settings(central_images__noise_multiplier=0.37, dataset__num_examples=3_000)
    plan, split = plan_of(config), random_split(3_000)
    kept = released_sums(monkeypatch, split, config)
    mean = (kept["mean"] / plan.num_examples).clamp(0.0, 1.0)
    second = from_triangle((kept["second"] / plan.num_examples).double())
    basis = leading(second, 4)
    spread, firsts = (basis @ second @ basis.T).diagonal(), torch.zeros(CLASSES, 1, 4).double()
    centers = [firsts]
    for number in range(ROUNDS):
        sums = kept[PARTS[2 + number]].double()
        centers.append(next_centers(centers[-1], sums, spread, number, plan))
    reach = reach_of(centers[-1], sums, spread, plan)
    assert reach < 0.9 * plan.max_norm
    assert reach == pytest.approx(kept["reach"].item())
    sums = sums_of(split, config, mean, basis, centers[1], (centers[2], reach))
    for number, (name, (_, stddev)) in enumerate(bounds(plan, reach).items()):
        drawn = stddev * box_muller(NOISE, number, sums[name].numel()).view_as(sums[name])
        assert torch.equal(kept[name], (sums[name] + drawn).float()), name
        assert not torch.equal(kept[name], sums[name].float() + drawn.float()), name


def test_divisors_are_public_or_released(monkeypatch):
    config = settings(central_images__num_components=16, central_images__noise_multiplier=0.5,
                      dataset__num_examples=2_900)  # fmt: skip
    plan, split = plan_of(config), random_split(3_000)
    split.images[::2] //= 4  # Two clusters in each class.
    kept = released_sums(monkeypatch, split, config)
    found = release_moments(split, CLASSES, config.central_images, plan, NOISE)
    mean = (kept["mean"] / 2_900).clamp(0.0, 1.0)  # As the configuration says; there are 3,000.
    assert torch.equal(found.mean.flatten(), mean)
    trace = from_triangle(kept["second"].double()).trace() / 2_900
    assert found.variance.item() == pytest.approx(trace.item(), rel=1e-6)
    last = kept["clusters of round 1"].double()
    torch.testing.assert_close(found.counts.double(), last[..., 0] / plan.count_norm)
    assert (found.counts - found.counts.round()).abs().max() > 1e-3  # Noisy.
    assert (found.counts > plan.smallest_count).all()
    means = last[..., 1:] / (last[..., :1] / plan.count_norm)
    torch.testing.assert_close(found.means.double(), means, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.seconds, from_triangle(kept["cluster seconds"]))


def test_without_noise_each_class_has_the_moments_of_its_images(monkeypatch):
    config = settings(
        central_images__image_size=4, central_images__num_components=16,
        central_images__num_clusters=1,
    )  # fmt: skip
    quiet = dataclasses.replace(plan_of(config), noise_multiplier=1e-12)
    assert quiet.num_rounds == 1
    monkeypatch.setattr(moments, "reach_of", lambda *_: quiet.max_norm)  # Clips none.
    split = random_split(300, side=4)
    labels = torch.where(split.labels == 2, 1, split.labels)  # Class 2 is empty.
    images = Split(split.images, labels)
    found = release_moments(images, CLASSES, config.central_images, quiet, NOISE)
    pixels = split.images.double().flatten(1) / 255
    mean = pixels.sum(0) / 300
    basis = found.basis.flatten(1).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(16).double(), rtol=0, atol=1e-6)
    for label in range(2):
        rows = (pixels[labels == label] - mean) @ basis.T
        assert found.counts[label].item() == pytest.approx(len(rows))
        center = rows.mean(0)
        torch.testing.assert_close(found.means[label, 0].double(), center, rtol=0, atol=1e-5)
        products = (rows - center).T @ (rows - center)
        torch.testing.assert_close(found.seconds[label, 0].double(), products, rtol=0, atol=1e-3)
    assert not found.means[2].any()


def test_numbers_of_the_release_come_from_the_configuration_alone():
    config = load({}, MOMENTS | {"central_images.pixel_center": 0.5, "dataset.channels": 3})
    size = (3 * 25) ** 0.5
    shares = (0.02, 0.18, 0.1, 1 - (0.02 + 0.18 + 0.1))
    plan = make_plan(config).moments
    assert plan is not None
    assert dataclasses.astuple(plan) == (4.0, size / 2, size, 1, 1, *shares, 1000, 1.0)
    config = load({}, MOMENTS | {"central_images.num_clusters": 7, "central_images.num_rounds": 5})
    plan = make_plan(config).moments
    assert plan is not None
    assert (plan.num_clusters, plan.num_rounds) == (7, 5)
    assert 5 * plan.round_share == pytest.approx(0.1)


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_the_charge_is_that_of_one_gaussian_mechanism(relation):
    """Replacing a record by an empty one moves the scaled sums by 1, by any other by up to 2."""
    terms = {"privacy.neighboring_relation": relation, "privacy.target_epsilon": 3.0}
    found = check_stages(load({}, MOMENTS | terms))["moments"]
    distance = {"zero_out": 1.0, "replace_one": 2.0}[relation]
    exact = privacy_loss_distribution.from_gaussian_mechanism(4.0, sensitivity=distance)
    assert found == pytest.approx(exact.get_epsilon_for_delta(1e-4), rel=1e-3)


def test_replacing_one_record_moves_each_sum_by_at_most_twice_its_norm():
    config = settings(central_images__image_size=4, central_images__max_norm=2.0)
    ours, theirs = random_split(60, side=4), random_split(60, side=4)
    ours.images[7], theirs.images[7], theirs.labels[7] = 0, 255, 2
    mean = torch.full((16,), 0.5)
    basis = torch.full((1, 16), 0.25, dtype=torch.float64)
    sums = [sums_of(split, config, mean, basis) for split in (ours, theirs)]
    for name, (norm, _) in bounds(plan_of(config)).items():
        moved = (sums[0][name] - sums[1][name]).norm()
        assert moved <= 2 * norm * (1 + TINY)
    moved = (sums[0]["clusters of round 0"] - sums[1]["clusters of round 0"]).norm()
    assert moved > 2**0.5 * plan_of(config).cluster_norm * (1 - TINY)


def test_epsilon_of_the_trial_is_that_of_moments_and_dp_sgd():
    plan = make_plan(load({}, MOMENTS | {"central_images.noise_multiplier": 6.0}))
    sigma = plan.noise_multiplier
    assert plan.mechanisms == [(1.0, 6.0, 1), (0.05, sigma, 18)]
    assert plan.epsilon == pytest.approx(epsilon_of(dp_events(plan.mechanisms), 1e-4, "zero_out"))
    assert 0.99 < plan.epsilon <= 1.0
    assert 0 < plan.epsilon_central < plan.epsilon
    assert [event.kind for event in events_of(plan, "shared")] == ["moments", "dp_sgd"]
    assert [event.release for event in events_of(plan, "shared")] == ["shared", ""]
    assert PrivacyPlan.restored(plan.summary()) == plan
    with pytest.raises(InfeasibleError, match=r"the moments alone spend epsilon .* raise central"):
        make_plan(load({}, MOMENTS | {"central_images.noise_multiplier": 2.0}))


@pytest.mark.parametrize(("method", "name"), [("moments", "moments"), ("dp_merf", "frequency")])
def test_a_method_without_training_spends_the_whole_budget_on_its_release(method, name):
    settings = SMALL | {"method": method, "privacy.dp_accuracy_stddev": 40.0}
    settings |= {"central_images.image_size": 8, "privacy.target_epsilon": 2.0}
    config = load({}, settings)
    plan = make_plan(config)
    release = getattr(plan, name)
    assert plan.mechanisms == [(1.0, release.noise_multiplier, 1), (1.0, 40.0, 1)]
    assert plan.noise_multiplier == release.noise_multiplier
    assert 1.99 < plan.epsilon <= 2.0
    assert plan.epsilon == pytest.approx(epsilon_of(dp_events(plan.mechanisms), 1e-4, "zero_out"))
    alone = epsilon_of(dp_events(plan.mechanisms[:1]), 1e-4, "zero_out")
    assert plan.epsilon_central + plan.epsilon_frequency == pytest.approx(alone)
    assert plan.epsilon_score == pytest.approx(plan.epsilon - alone)
    assert plan.epsilon_dp_sgd == 0
    assert plan.epsilon_after(0) == pytest.approx(plan.epsilon)
    assert [event.kind for event in events_of(plan)] == [name, "dp_accuracy"]
    assert PrivacyPlan.restored(plan.summary()) == plan == resumed_plan(config, plan)
    weaker = dataclasses.replace(release, noise_multiplier=0.9 * release.noise_multiplier)
    with pytest.raises(ConfigError, match="does not agree"):
        resumed_plan(config, dataclasses.replace(plan, **{name: weaker}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dataset__image_size": 128, "central_images__image_size": 128},
         "image_size=128 gives images of 16384 values, whose second moment takes 10.0 GiB: choose "
         "at most 64, of 4096"),
        ({"dataset__channels": 3, "dataset__image_size": 64, "central_images__image_size": 64},
         "gives images of 12288 values, .* at most 36"),
        ({"central_images__num_components": 65}, r"num_components=65 must lie in \[1, 64\]"),
        ({"central_images__subspace_share": 0.9}, "add up to 1.02, which must be below 1"),
        ({"method": "moments", "early_scores__at": [0.5]}, "needs training steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        settings(**changes)


@pytest.mark.parametrize("changes", [
    {"scope": "sweep", "num_shares": 3}, {"scope": "sweep", "num_shares": 3, "adaptive": False},
    {"scope": "selection"}, {"scope": "public"}, {"neighboring_relation": "replace_one"},
])  # fmt: skip
def test_every_scope_pays_for_a_method_without_training(changes):
    settings = SMALL | {"method": "moments", "privacy.target_epsilon": 4.0}
    settings |= {"central_images.image_size": 8}
    alone = make_plan(load({}, settings))
    config = load({}, settings | {f"privacy.{key}": value for key, value in changes.items()})
    plan = make_plan(config)
    assert resumed_plan(config, plan) == plan
    if "neighboring_relation" in changes:  # Twice as far, so twice the noise.
        assert plan.noise_multiplier == pytest.approx(2 * alone.noise_multiplier, rel=1e-3)
    elif changes["scope"] == "public":
        assert plan.noise_multiplier == alone.noise_multiplier
    else:
        assert plan.noise_multiplier > 1.3 * alone.noise_multiplier
        assert plan.epsilon < alone.epsilon
