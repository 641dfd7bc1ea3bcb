"""Light: too little of it, or too much."""

from __future__ import annotations

import cv2
import numpy as np

from builders.degradations.base import Degraded, finish, log_lerp, pick, to_display, to_linear, uniform
from builders.degradations.noise import add_sensor

DARK_KINDS = {"exposure": 0.6, "gamma": 0.4}
EXPOSURE = (0.5, 0.05)  # factor on linear light
GAMMA = (1.5, 3.0)  # exponent on display values
GAMMA_EXPOSURE = (0.8, 0.35)
SHOT = (2e-4, 2e-3)
READ = (5e-4, 3e-3)
OVEREXPOSURE = (1.6, 5.0)


def dark(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """Under-exposure (x 0.5–0.05 in linear light) or a dark tone curve (γ 1.5–3), with noise and a colour cast."""
    kind = pick(rng, DARK_KINDS)
    gamma = log_lerp(severity, *GAMMA) if kind == "gamma" else 1.0
    exposure = log_lerp(severity, *(GAMMA_EXPOSURE if kind == "gamma" else EXPOSURE))
    linear = to_linear(cv2.pow(image, gamma)) * np.float32(exposure)
    gains = [uniform(rng, 0.85, 1.15) for _ in range(3)]
    shot, read = log_lerp(severity, *SHOT), log_lerp(severity, *READ)
    linear = add_sensor(linear * np.array(gains, np.float32), rng, shot, read, grain=0.6)
    params = {"exposure": exposure, "gamma": gamma, "gains": gains, "shot": shot, "read": read}
    return finish(to_display(linear), severity, kind=kind, **params)


def overexposed(image: np.ndarray, rng: np.random.Generator, severity: float) -> Degraded:
    """1.6–5 times the light, clipped channel by channel as a sensor does, over a slightly lifted black."""
    gain, lift = log_lerp(severity, *OVEREXPOSURE), uniform(rng, 0, 0.03)
    linear = to_linear(image) * np.float32(gain) + np.float32(lift)
    return finish(to_display(linear), severity, gain=gain, lift=lift)
