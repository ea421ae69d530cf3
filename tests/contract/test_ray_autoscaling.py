"""That our copy of Ray Serve's target policy is Ray's: its defaults, its old names and its formula."""

import itertools

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from kervan.config.autoscale import RaySettings, parse_ray
from kervan.policy.autoscale.ray_target import wanted


def test_the_defaults_are_rays() -> None:
    ours, rays = RaySettings(), AutoscalingConfig()
    for name in (
        "target_ongoing_requests", "look_back_period_s", "upscale_delay_s", "downscale_delay_s",
        "downscale_to_zero_delay_s", "metrics_interval_s",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(rays, name), name
    assert (ours.upscaling_factor, ours.downscaling_factor) == (
        rays.get_upscaling_factor(),
        rays.get_downscaling_factor(),
    )


@pytest.mark.parametrize("up", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("down", [0.1, 0.5, 1.0])
def test_the_formula_is_rays(up: float, down: float) -> None:
    ours = RaySettings(target_ongoing_requests=3.0, upscaling_factor=up, downscaling_factor=down)
    rays = AutoscalingConfig(
        min_replicas=0, max_replicas=100, target_ongoing_requests=3.0, upscaling_factor=up, downscaling_factor=down
    )
    for running, ongoing in itertools.product(range(1, 9), range(0, 40, 3)):
        exact = running * (ongoing / (3.0 * running))
        theirs = autoscaling_policy._apply_scaling_factors(exact, running, rays)
        assert wanted(float(ongoing), running, running, ours) == max(0, theirs), (running, ongoing)


@pytest.mark.parametrize("name", ["smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor"])
def test_old_names_that_ray_still_takes_mean_the_same(name: str) -> None:
    ours, _ = parse_ray({name: 0.5})
    rays = AutoscalingConfig(**{name: 0.5})
    assert (ours.upscaling_factor, ours.downscaling_factor) == (
        rays.get_upscaling_factor(),
        rays.get_downscaling_factor(),
    )
