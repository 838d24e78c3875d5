"""Scaling: how much faster more cores are, measured on this machine and predicted for others.

==============  ========================================================================================
``laws``        speedup, efficiency, Amdahl, Gustafson, Karp-Flatt: equations
``network``     the alpha-beta cost of summing a gradient: presets, and a measurement
``prediction``  a step on more ranks: measured compute, modeled communication, simulated overlap
``jobs``        what one process, or one rank, is asked to measure; ``worker``: jobs as processes
``grid``        ranks x threads in rounds, and what is made of them: a ``report``, ``plots``
``classic``     the five configurations of the classic comparison, as real trainings
==============  ========================================================================================

>>> from convolt.scaling import laws
>>> round(laws.amdahl(0.05, workers=16), 2)
9.14
"""

from convolt.scaling import laws, network
from convolt.scaling.classic import Comparison, compare, trainer
from convolt.scaling.grid import Plan, Point, scale
from convolt.scaling.network import NETWORKS, Network
from convolt.scaling.prediction import Timeline, Trace, Tracer, predict
from convolt.scaling.report import ScalingReport
from convolt.scaling.worker import run

__all__ = [
    "NETWORKS",
    "Comparison",
    "Network",
    "Plan",
    "Point",
    "ScalingReport",
    "Timeline",
    "Trace",
    "Tracer",
    "compare",
    "laws",
    "network",
    "predict",
    "run",
    "scale",
    "trainer",
]
