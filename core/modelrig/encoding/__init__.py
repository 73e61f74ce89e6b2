"""What a model makes of given tokens, without generating: inputs of one forward, hidden states, embeddings of texts."""
