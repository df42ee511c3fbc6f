# SPDX-License-Identifier: Apache-2.0
"""Tangents of images: exact on ramps, consistent with each other, and what they refuse."""

import math

import pytest
import torch

import fisherfast as ff
from fisherfast.information.nuisances import IMAGE_NUISANCES, tangents

DOUBLE = torch.float64


def ramp(height, width):
    """Pixel coordinates from the middle of the image: x to the right, y down."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=DOUBLE) - (height - 1) / 2, torch.arange(width, dtype=DOUBLE) - (width - 1) / 2, indexing="ij"
    )
    return x, y


@pytest.mark.parametrize("height, width", [(9, 9), (8, 12), (11, 6)])
def test_exact_on_ramps(height, width):
    # I(x, y) = a x + b y is what bilinear interpolation has no error of; away from the border.
    x, y = ramp(height, width)
    a, b = 0.7, -1.3
    got = {name: t[0, 0, 3:-3, 2:-2] for name, t in ff.image_tangents((a * x + b * y)[None, None]).items()}
    inner = slice(3, -3), slice(2, -2)
    torch.testing.assert_close(got["shift x"], torch.full_like(got["shift x"], -a))
    torch.testing.assert_close(got["shift y"], torch.full_like(got["shift y"], -b))
    # What is at (x, y) after a turn by t came from (x cos t + y sin t, y cos t - x sin t): the slope is a y - b x.
    step = 2 / max(height, width)
    torch.testing.assert_close(got["rotation"], ((a * y - b * x) * math.sin(step) / step)[inner])
    assert torch.equal(got["brightness"], torch.ones_like(got["brightness"]))
    torch.testing.assert_close(got["contrast"], (a * x + b * y)[inner])


def test_shift_moves_right_and_down():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    got = ff.image_tangents(image, ["shift x", "shift y"])
    right, down = got["shift x"][0, 0], got["shift y"][0, 0]
    assert right[2].tolist() == pytest.approx([0, -0.5, 0, 0.5, 0], abs=1e-5)
    assert down[:, 2].tolist() == pytest.approx([0, -0.5, 0, 0.5, 0], abs=1e-5)


def test_flat_images_and_channels():
    images = torch.rand(3, 2, 4, 5, dtype=DOUBLE)
    whole, flat = ff.image_tangents(images), ff.image_tangents(images.flatten(1), shape=(2, 4, 5))
    assert list(whole) == list(IMAGE_NUISANCES)
    for name, tangent in whole.items():
        assert tangent.shape == images.shape
        assert torch.equal(flat[name], tangent.flatten(1))


def test_functions_are_differentiated_where_nothing_moves():
    x = torch.randn(4, 3, dtype=DOUBLE)
    given = torch.randn_like(x)
    rows = tangents("test", x, {"given": given, "wave": lambda x, a: torch.sin(x + a) - torch.sin(x) + x})
    assert len(rows) == 4
    torch.testing.assert_close(torch.stack(rows), torch.stack([given, x.cos()], 1))


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(3, 16), {}, r"x must be \[N, C, H, W\], got \(3, 16\); pass shape="),
        (torch.zeros(3, 16), {"shape": (1, 4, 5)}, r"x must hold images of shape \(1, 4, 5\)"),
        (torch.zeros(0, 1, 4, 4), {}, "x must hold images"),
        (torch.zeros(3, 16), {"shape": (4, 4)}, "x must hold images"),
        (torch.zeros(1, 1, 4, 4), {"names": ["shear"]}, r"names must be among .*, got \['shear'\]"),
        (torch.zeros(1, 1, 4, 4), {"names": []}, r"names must be among .*, got \[\]"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), {}, r"x must be floating, got torch\.uint8"),
    ],
)
def test_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        ff.image_tangents(x, **options)


def test_contrast_is_about_the_mean_of_all_channels():
    x = torch.rand(2, 3, 4, 5, dtype=DOUBLE)
    torch.testing.assert_close(ff.image_tangents(x, ["contrast"])["contrast"], x - x.flatten(1).mean(1)[:, None, None, None])


def test_a_nuisance_moves_nothing_at_amount_zero():
    x = torch.rand(2, 3, dtype=DOUBLE)
    assert len(tangents("here", x, {"brighter": lambda x, amount: x * (1 + amount)})) == 2
    with pytest.raises(ValueError, match=r"here: along\['scale'\] must move nothing at amount 0"):
        tangents("here", x, {"scale": lambda x, amount: amount * x})
