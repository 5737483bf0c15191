"""From files to batches: data sets, their appearance, the plan of an epoch."""
