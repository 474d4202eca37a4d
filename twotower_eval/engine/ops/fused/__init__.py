"""Our own kernels for steps of a few token rows on a GPU, in Triton: one launch where plain torch makes ten.

A step of a small batch reads its weights once and computes next to nothing, so that what counts is how few launches
it takes and how fast weights stream. Nothing here is imported unless Triton is there; the modules of ops register each
function with :mod:`twotower_eval.engine.ops.kernels`, which lets it be used where it has proved to agree with the plain
form beside it. Triton's interpreter (``TRITON_INTERPRET=1``) runs the same code on a CPU, which is how it is tested.
Shape letters: see ops/__init__.
"""
