"""What commands share; no commands."""
