"""Dataset card of a bundle for the Hugging Face Hub, and the types of its parquet file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.privacy.accounting.rounding import upward
from core.privacy.ledger.card import three_epsilons
from core.publish.proven import bounds_in_words

PARQUET = "data/train-00000-of-00001.parquet"
"""Where Hugging Face's `datasets` looks for the split `train`."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


_TYPES = """configs:
- config_name: default
  data_files:
  - split: train
    path: {path}
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
"""
_LOADING = """```python
from datasets import load_dataset

images = load_dataset("FOLDER", split="train")
```

"""
_ARRAYS = """```python
import numpy as np

with np.load("FOLDER/images.npz") as stored:  # uint8 [N, C, H, W] and int64 [N]
    images, labels = stored["images"], stored["labels"]
```

"""
_GENERATOR = """`generator/` holds the weights of the model and its settings, data without code; \
they are covered by the same guarantee. safetensors and torch alone read them:

```python
import json
from pathlib import Path

from safetensors.torch import load_file


def load(generator):
    folder = Path(generator)
    settings = json.loads((folder / "settings.json").read_text())
    class_names = json.loads((folder / "classes.json").read_text())["class_names"]
    return load_file(folder / "weights.safetensors"), settings, class_names


weights, settings, class_names = load("FOLDER/generator")
```

More images: `python -m core generate --bundle FOLDER --num-images N --out NEW.npz`.

"""
_READING = {"parquet": _LOADING, "npz": _ARRAYS, "generator": _GENERATOR}
"""How to read each format."""
_NO_LICENSE = "\nNo license is stated; release with `--license` to state one.\n"


def parquet_metadata(class_names: Sequence[str]) -> dict[str, str]:
    """Schema metadata by which `datasets` reads the columns as `Image` and `ClassLabel`."""
    label = {"names": list(class_names), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def dataset_card(
    card: Mapping[str, Any],
    num_images: int,
    class_names: Sequence[str],
    formats: Sequence[str],
    license_id: str,
) -> str:
    """README.md with the front matter that the Hugging Face Hub reads.

    Args:
        card: the privacy card, as of `release_card`.
        class_names: of the labels 0, 1, ...; public.
        formats: what the bundle holds; only with `parquet` is there something to load.
        license_id: identifier of the Hub, such as `cc-by-4.0`; `unknown` leaves it open.
    """
    size = next((name for limit, name in _SIZES if num_images < limit), "1M<n<10M")
    types, figures = "", list(three_epsilons(card))
    if "parquet" in formats:
        quoted = [json.dumps(name, ensure_ascii=False) for name in class_names]  # As in YAML.
        names = "\n".join(f"          '{label}': {name}" for label, name in enumerate(quoted))
        types = _TYPES.format(path=PARQUET, names=names)
    figures += [
        ("delta", upward(card["delta"], 6)),
        ("unit of protection", card["unit"]),
        ("neighbouring data sets", card["neighboring_relation_in_words"]),
        ("in words", card["attack"]["epsilon_released_with_selection"]),
        ("audit by canaries", bounds_in_words(card["audit"])),
    ]
    template = Path(__file__).with_suffix(".txt").read_text()
    return template.format(
        license_id=license_id,
        size=size,
        types=types,
        num_images=num_images,
        num_classes=len(class_names),
        statement=card["statement"],
        figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        labels="\n".join(f"- {label}: {name}" for label, name in enumerate(class_names)),
        loading="".join(text for name, text in _READING.items() if name in formats),
        no_license=_NO_LICENSE if license_id == "unknown" else "",
    )
