"""First-party components: one folder per kind, one file (or a planner and its `_module`) per component."""
