"""Replace the attention of trained models while keeping their weights: exact, linear or block-wise, per head.

Needs only torch; ``elfatt.integrations`` converts and restores the models of timm, transformers and diffusers.
"""

from elfatt.conversion.agent import Agent
from elfatt.conversion.attention import hybrid_attention, run_plan
from elfatt.conversion.calibrate import Attend, Calibration, calibrate, multiply_adds
from elfatt.conversion.handle import Handle
from elfatt.conversion.plan import Head, LayerPlan, Plan

__all__ = [
    "Agent",
    "Attend",
    "Calibration",
    "Handle",
    "Head",
    "LayerPlan",
    "Plan",
    "calibrate",
    "hybrid_attention",
    "multiply_adds",
    "run_plan",
]
