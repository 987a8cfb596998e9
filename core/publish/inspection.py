"""Inspection for the owner of the data alone: classes, neighbours and a membership attack."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.config import Config
from core.data import Dataset, Split
from core.errors import DataError
from core.evaluation.membership import attacks, denoising_losses, noise_levels
from core.evaluation.metrics import confusion, downstream_classifier
from core.evaluation.neighbors import Neighbors, Space, nearest, pixels
from core.evaluation.reference import real_reference
from core.generation.png import encode_png
from core.io.files import private_folder, write_json, write_whole
from core.privacy.accounting.rounding import upward
from core.publish.class_table import COLUMNS, class_rows
from core.record.folder import RunFolder, class_names

_SHOWN = 24
"""Pairs in each table of the page."""
_CLOSE = 0.01
"""Share of held-out images that counts as unusually close to the training images."""


def inspect_run(
    run: RunFolder,
    config: Config,
    denoiser: nn.Module,
    dataset: Dataset,
    max_images: int,
    device: str,
) -> tuple[Path, dict[str, Any]]:
    """Writes the page and the figures of a finished run into `RUN/non_private`.

    Args:
        denoiser: the run's averaged weights, in evaluation mode.
        max_images: most synthetic, training and held-out images that are looked up or attacked;
            neighbours are searched among all training images.

    Returns:
        The page, and the figures as plain data.

    Raises:
        DataError: fewer than 4 held-out images, too few for the attack.

    Privacy: shows real images and figures computed from them without noise. Neither the release
        nor MLflow takes anything from that folder.
    """
    if len(dataset.test.labels) < 4:
        raise DataError(
            f"{len(dataset.test.labels)} test images: the attack needs 4 that were not trained on"
        )
    settings, seed = config.evaluation, config.evaluation.seed
    plan, synthetic = run.plan(), Split.read(run.images)
    members, others = _part(dataset.train, max_images, seed), _part(dataset.test, max_images, seed)
    losses = [
        denoising_losses(denoiser, part, config.diffusion, settings.batch_size, seed, device)
        for part in (members, others)
    ]
    sigmas = noise_levels(config.diffusion)
    membership = attacks(losses[0], losses[1], sigmas, plan.epsilon, plan.delta, seed)

    shown = _part(synthetic, max_images, seed)
    cache, classes = Path(config.runtime.cache), config.dataset.num_classes
    extractor = real_reference(dataset, settings, classes, device, cache).extractor
    spaces: dict[str, Space] = {"features": extractor, "pixels": pixels}
    found: dict[str, Neighbors] = {}
    closeness: dict[str, dict[str, float]] = {}
    for name, space in spaces.items():
        found[name] = nearest(shown.images, dataset.train.images, space, settings.batch_size)
        held_out = nearest(others.images, dataset.train.images, space, settings.batch_size)
        limit = held_out.distances.quantile(_CLOSE)
        closeness[name] = {
            "median_of_synthetic": found[name].distances.median().item(),
            "median_of_held_out": held_out.distances.median().item(),
            "limit": limit.item(),
            "share_of_synthetic_below_limit": (found[name].distances < limit)
            .double()
            .mean()
            .item(),
        }
    by_class = {
        "names": class_names(run.path, classes),
        "synthetic": _confusion(synthetic, dataset, config, device),
        "real": _confusion(dataset.train, dataset, config, device),
    }
    figures = {"membership": membership, "closeness": closeness, "extractor": extractor.what}
    figures["classes"] = by_class
    folder = run.non_private
    private_folder(folder)
    (folder / ".gitignore").write_text("*\n")
    content = {"NON-PRIVATE": "never publish this", **figures}
    write_json(run.inspection, content, private=True)
    page = folder / "inspection.html"
    write_whole(page, _page(run.path.name, shown, dataset.train, found, figures), private=True)
    return page, figures


def _confusion(images: Split, dataset: Dataset, config: Config, device: str) -> list[list[int]]:
    """Of the first classifier of the scores, trained on the images, on real test images."""
    settings, num_classes = config.evaluation, config.dataset.num_classes
    network = settings.classifiers[0]
    model = downstream_classifier(images, settings, num_classes, device, network)
    return confusion(model, dataset, num_classes, settings.batch_size)


def _part(split: Split, count: int, seed: int) -> Split:
    """At most `count` images, in random order."""
    chosen = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[:count]
    return Split(split.images[chosen], split.labels[chosen])


def _page(
    run: str,
    synthetic: Split,
    real: Split,
    found: Mapping[str, Neighbors],
    figures: Mapping[str, Any],
) -> str:
    tables: list[str] = []
    for title, order in (
        ("Closest in features", found["features"].distances.argsort()),
        ("Closest in pixels", found["pixels"].distances.argsort()),
        ("At random", torch.arange(len(synthetic.labels))),
    ):
        tables.append(f"<h2>{title}</h2>{_pairs(order[:_SHOWN].tolist(), synthetic, real, found)}")
    return (
        Path(__file__)
        .with_suffix(".html")
        .read_text()
        .format(
            run=html.escape(run),
            membership=_membership(figures["membership"]),
            closeness=_closeness(figures["closeness"]),
            extractor=html.escape(figures["extractor"]),
            classes=_classes(figures["classes"]),
            tables="\n".join(tables),
        )
    )


def _pairs(
    numbers: Sequence[int], synthetic: Split, real: Split, found: Mapping[str, Neighbors]
) -> str:
    cells: list[str] = []
    for number in numbers:
        label = int(synthetic.labels[number])
        pictures = [_picture(synthetic.images[number], "synthetic", f"class {label}")]
        for name, neighbors in found.items():
            at = int(neighbors.indices[number])
            text = f"class {int(real.labels[at])}, {neighbors.distances[number]:.3g}"
            pictures.append(_picture(real.images[at], f"REAL, by {name}", text))
        cells.append(f'<div class="pair">{"".join(pictures)}</div>')
    return f'<div class="pairs">{"".join(cells)}</div>'


def _picture(image: torch.Tensor, title: str, text: str) -> str:
    data = base64.b64encode(encode_png(image)).decode()
    kind = "real" if title.startswith("REAL") else "synthetic"
    return (
        f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt="{title} image, '
        f'{text}"><figcaption>{title}<br>{text}</figcaption></figure>'
    )


def _share(found: Mapping[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{found[name]:.4f} (95 % interval {low:.4f} to {high:.4f})"


def _membership(found: Mapping[str, Any]) -> str:
    bound = found["tpr_bound"]
    verdict = (
        "The attack stays within what epsilon allows"
        + ("; at this epsilon that is no restriction." if bound >= 1 else ".")
        if found["within_bound"]
        else "THE ATTACK EXCEEDS WHAT EPSILON ALLOWS: the guarantee does not hold, or held-out and "
        "training images are of different kinds. Do not publish before this is understood."
    )
    rows = (
        ("training and held-out images", f"{found['num_members']} and {found['num_others']}"),
        ("area under the curve (0.5 is guessing)", _share(found, "auc")),
        (
            f"true positives at nominally {found['nominal_fpr']:.0%} false ones",
            _share(found, "tpr"),
        ),
        ("false positives measured there", _share(found, "fpr")),
        (
            f"true positives that epsilon {upward(found['epsilon'])}, delta "
            f"{upward(found['delta'], 6)} allows",
            f"{found['tpr_bound_at_nominal_fpr']:.4f} at {found['nominal_fpr']:.0%} false positives"
            f", {bound:.4f} at {found['fpr_interval'][1]:.4f}",
        ),
        ("epsilon that the attack proves", f"at least {found['epsilon_lower_bound']:.4g}"),
    )
    table = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{table}</table><p><b>{verdict}</b></p>{_levels(found['levels'])}"


def _levels(levels: Sequence[Mapping[str, Any]]) -> str:
    """The attack by the loss at each noise level alone, on which no verdict rests."""
    names = {"auc": "area", "tpr": "true positives", "fpr": "false positives"}
    head = "".join(f"<th>{name}</th>" for name in ("noise level sigma", *names.values()))
    rows = "".join(
        f"<tr><td>{each['sigma']:.3g}</td>"
        + "".join(f"<td>{_share(each, name)}</td>" for name in names)
        + "</tr>"
        for each in levels
    )
    return (
        "<p>Above, the loss is averaged over all noise levels. Below it is that of one; of so many "
        f"intervals some miss by chance.</p><table><tr>{head}</tr>{rows}</table>"
    )


def _classes(found: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in class_rows(found)
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _closeness(found: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td>{each['median_of_synthetic']:.4g}</td>"
        f"<td>{each['median_of_held_out']:.4g}</td>"
        f"<td>{each['share_of_synthetic_below_limit']:.1%}</td></tr>"
        for name, each in found.items()
    )
    return (
        "<table><tr><th></th><th>synthetic, median</th><th>held-out, median</th>"
        f"<th>synthetic closer than the closest {_CLOSE:.0%} of held-out</th></tr>{rows}</table>"
    )
