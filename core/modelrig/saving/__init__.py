"""From a model or a checkpoint to files: which tensors, their bytes in parts, and what lies beside them."""
