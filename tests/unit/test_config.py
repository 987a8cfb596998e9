"""One set of dotted keys everywhere, and errors that name key, range and nearest name."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.config import flatten, load, nested, parse_overrides, yaml_subset
from core.errors import ConfigError

CONFIGS = sorted(Path("core/configs").glob("*.yaml")) + sorted(Path("sweep/configs").glob("*.yaml"))


def test_flat_keys_load_back():
    base = load({}, {"stage_split": 0.25, "model.channel_multipliers": [1, 2, 2]})
    assert load({}, flatten(base)) == base
    assert load(nested(base)) == base


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stage_spilt": 0.3}, r"unknown key 'stage_spilt'; did you mean 'stage_split'\?"),
        ({"central_images.perclass": 3}, r"did you mean 'central_images\.per_class'"),
        ({"per_class": 3}, r"did you mean 'central_images\.per_class'"),
        (
            {"private_training.noise_multiplicity": 0},
            r"private_training\.noise_multiplicity=0 .* integer in \[1, 256\]",
        ),
        ({"stage_split": 1}, r"stage_split=1 .* \[0, 1\)"),
        ({"dataset.name": "mnits"}, r"one of 'digits', 'idx', 'image_folder'"),
        ({"seed.x": 1}, r"'seed'"),
        ({"dataset.image_size": 9}, r"multiple of 2"),
        ({"sampler.sigma_min": 90}, r"sigma_min=90"),
    ],
)
def test_errors_name_key_range_and_nearest_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load({"seed": 1}, overrides)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file at '.*nowhere\.yaml'"):
        load(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: 1\n- item\n")
    with pytest.raises(ConfigError, match="line 2"):
        load(bad)


def test_overrides_are_typed():
    assert parse_overrides(["a=1e-5", "b=[1,2]", "c=null", "d=text", "e=-3", "f=true"]) == {
        "a": 1e-5, "b": [1, 2], "c": None, "d": "text", "e": -3, "f": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides(["seed"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_mean_the_same_to_a_full_yaml_parser(path):
    class Loader(yaml.SafeLoader):
        """YAML 1.2 numbers: 1e-5 is a number."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
    )
    assert yaml_subset.parse(path.read_text()) == yaml.load(path.read_text(), Loader)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet=st.sampled_from("ab ,#'\"\\[]:\n\u00e9"), max_size=12),
)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
TREES = st.recursive(
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3)),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_what_is_written_reads_back(content):
    assert yaml_subset.parse(yaml_subset.dump(content)) == content


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "a: &x 1",
        "a: {b: 1}",
        "a: 1\na: 2",
        "a: [1, 2",
        "a: |\n  x",
        "  b: 1\n c: 2",
        "a: b: c",
    ],
)
def test_what_lies_outside_the_subset_is_an_error_with_its_line(text):
    with pytest.raises(ValueError, match="line"):
        yaml_subset.parse(text)
