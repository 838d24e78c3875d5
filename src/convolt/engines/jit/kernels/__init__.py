"""Kernels of the jit engine, one file for each kind of layer.

A kernel is a Python function ``kernel(arguments, chunk, thread)`` made by a factory from a frozen spec, so that every
size and stride is a constant when it is compiled. ``arguments`` holds addresses; the first is always the step's state,
whose first number is how many samples the batch has. A chunk is a run of samples, or of weights where the docstring
says so. What a chunk writes depends on nothing but the chunk: threads and their order never change a bit.
"""
