"""Engines of NVIDIA TensorRT, 10.x and 11.x: building them, keeping them, running them.

Nothing here imports ``tensorrt`` or touches a GPU before :func:`dckt.runtime.tensorrt.load.load` has seen one.
"""
