"""Writing a checkpoint so that at every instant its folder holds the old one or the new one, whole."""
