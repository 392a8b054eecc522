"""What every phase shares: devices, checkpoints, logs and errors."""
