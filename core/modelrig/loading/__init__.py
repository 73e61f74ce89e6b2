"""From a plan to a filled module: schedule → execute → finalise."""
