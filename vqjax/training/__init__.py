"""Loss to parameters: one loop for every learned codec."""
