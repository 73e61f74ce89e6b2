"""One file per question. Peers run in the same session on the same work, each measurement in a process of its own, interleaved."""
