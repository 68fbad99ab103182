"""A GPU without a GPU: runs PTX, as Triton compiles it, on CPU tensors, and refuses what a GPU might do otherwise."""
