"""Scaling: how much faster more cores are, measured on this machine and predicted for others.

==============  ========================================================================================
``laws``        speedup, efficiency, Amdahl, Gustafson, Karp-Flatt: equations
``network``     the alpha-beta cost of summing a gradient: presets, and a measurement
``prediction``  a step on more ranks: measured compute, modeled communication, simulated overlap
==============  ========================================================================================
"""
