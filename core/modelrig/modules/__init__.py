"""What architectures are built from: norms, rotary embeddings, the linear slot, attention, the symbolic mask, cache bookkeeping."""
