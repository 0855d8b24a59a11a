"""Float checkpoints: sizes, names and classes of their tensors, reading and writing them."""
