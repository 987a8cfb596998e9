"""Pictures that other programs can read, and a log without repeated or torn lines."""

import io
import json
import math

import pytest
import torch
from PIL import Image

from core.generation.png import encode_png, write_grid
from core.io.files import numbers, to_json, write_json
from core.record.folder import MetricsLog, RunFolder


def decoded(content: bytes) -> tuple[str, torch.Tensor]:
    """Mode and pixels `[H, W, C]` as Pillow, which checks every checksum, sees them."""
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        mode, size = image.mode, image.size
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return mode, pixels.view(size[1], size[0], -1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (9, 5), (70, 64)])
def test_png_decodes_to_the_same_pixels(channels, mode, size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator)
    found_mode, pixels = decoded(encode_png(image))
    assert found_mode == mode
    assert torch.equal(pixels, image.permute(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_has_a_row_for_each_class(tmp_path, channels):
    labels = torch.tensor([2, 0, 2, 2, 0])
    values = torch.arange(5, dtype=torch.uint8)[:, None] * 50 + torch.arange(channels)
    images = values[..., None, None].to(torch.uint8).repeat(1, 1, 3, 2)
    path = tmp_path / "deeper" / "grid.png"
    write_grid(path, images, labels, columns=2, side=6)
    pixels = decoded(path.read_bytes())[1]
    height, width = 3 * 2 + 2, 2 * 2 + 2  # Twice enlarged, one pixel of frame on each side.
    assert pixels.shape == (2 * height, 2 * width, channels)
    # Class 0 holds images 1 and 4; class 2 holds 0, 2 and 3, of which two fit.
    for row, chosen in enumerate(((1, 4), (0, 2))):
        for column, number in enumerate(chosen):
            cell = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert (cell[1:-1, 1:-1] == values[number]).all()
            assert (cell[0] == 64).all()
            assert (cell[:, -1] == 64).all()


def test_grid_leaves_room_where_a_class_has_few_images(tmp_path):
    images = torch.full((3, 1, 4, 4), 200, dtype=torch.uint8)
    write_grid(tmp_path / "grid.png", images, torch.tensor([0, 0, 1]), side=1)
    pixels = decoded((tmp_path / "grid.png").read_bytes())[1][..., 0]
    assert pixels.shape == (12, 12)  # No image is ever made smaller.
    assert (pixels[1:5, 7:11] == 200).all()
    assert (pixels[7:11, 1:5] == 200).all()
    assert (pixels[7:11, 7:11] == 0).all()


def steps(path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["stage"]) for line in lines]


def test_log_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(RunFolder(tmp_path), 0)
    for step in (1, 2, 3, 4):
        log({"step": step, "stage": "private_training", "loss": 0.5})
    assert [step for step, _ in steps(path)] == [1, 2, 3, 4]
    again = MetricsLog(RunFolder(tmp_path), 2)
    again({"step": 3, "stage": "private_training"})
    assert [step for step, _ in steps(path)] == [1, 2, 3]
    MetricsLog(RunFolder(tmp_path), 0)
    assert steps(path) == []


def test_log_drops_an_evaluation_that_was_begun(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(RunFolder(tmp_path), 0)
    log({"step": 4, "stage": "private_training"})
    log({"step": 4, "stage": "evaluation"})
    MetricsLog(RunFolder(tmp_path), 4)({"step": 4, "stage": "evaluation"})
    assert steps(path) == [(4, "private_training"), (4, "evaluation")]


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "sta', '{"step": 2, "stage": "private_training", "loss": 0.', "{", "2"]
)
def test_log_drops_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(RunFolder(tmp_path), 0)({"step": 1, "stage": "warm_up"})
    path.write_text(path.read_text() + torn)
    MetricsLog(RunFolder(tmp_path), 2)({"step": 3, "stage": "warm_up"})
    assert steps(path) == [(1, "warm_up"), (3, "warm_up")]


def test_log_can_be_read_while_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(RunFolder(tmp_path), 0)
    log({"step": 1, "stage": "warm_up", "loss": math.pi})
    assert json.loads(path.read_text())["loss"] == math.pi


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deeper" / "file.json"
    write_json(path, {"a": 1, "b": [0.5, None]})
    assert json.loads(path.read_text()) == {"a": 1, "b": [0.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1, "b": [0.5, None]}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_strict_and_numbers_that_are_not_finite_come_back(indent):
    metrics = {"loss": math.nan, "epsilon": math.inf, "least": -math.inf, "step": 3, "tag": "a"}
    text = to_json({**metrics, "parts": [math.inf, ({"x": math.nan},)]}, indent)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    stored = json.loads(text, parse_constant=refuse)
    assert stored["parts"] == ["Infinity", [{"x": "NaN"}]]
    again = numbers(stored)
    assert math.isnan(again.pop("loss"))
    expected = {key: value for key, value in metrics.items() if key != "loss"}
    assert again == {**expected, "parts": stored["parts"]}


def test_a_log_with_a_loss_that_is_not_finite_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        MetricsLog(RunFolder(tmp_path), step - 1)(
            {"step": step, "stage": "private_training", "loss": math.nan}
        )
    assert [line.count('"loss": "NaN"') for line in path.read_text().splitlines()] == [1, 1]
