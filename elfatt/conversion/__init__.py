"""Replace the attention of trained models, keeping their weights: each head exact, linear or in blocks.

The core needs torch only; ``elfatt.integrations`` finds the layers of a model and puts everything back.
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
