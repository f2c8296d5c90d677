"""Temporary: the world model is in models.py now."""
from models import (TARGETS, WORLD_MODEL_SIZES, InverseDynamics, WorldModel, optical_flow,  # noqa: F401
                    shuffled_within, targets)
