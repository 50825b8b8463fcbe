"""Benchmarks of speed, memory and floating-point operations. docs/benchmarks.md defines the results.

Units of the results: `*_pass`, `block`, `pixel_frame`, `prompt` and `first_frame` are seconds. `fps_*` are pixel frames
per second. `peak_memory` and `cache` are bytes. `flops` and `host_syncs` are counts. `share_of_peak` is the speed
relative to large matrix products on the same machine.
"""
