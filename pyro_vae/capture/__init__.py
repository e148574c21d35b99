"""Programs as graphs: how :class:`pyro_vae.CompiledSVI` records and repeats them.

=============== ==================================================================
module          what it does
=============== ==================================================================
recording       watches a run: numbers read from tensors, tensors changed in place
graph           records a run as a graph whose inputs are all tensors it touched
surroundings    lists what a program can reach, to see when that changes
compilation     makes a graph fast
comparison      compares what a graph returns with the program
forms           tells which arguments a graph is for
stock_run       a run of Pyro that can be repeated from where it began
function        a function that is called many times, as evaluation does
step            a step of SVI as a graph, compared with Pyro
errors          says where and why a program cannot be recorded
=============== ==================================================================
"""

from pyro_vae.capture.errors import CaptureError

__all__ = ["CaptureError"]
