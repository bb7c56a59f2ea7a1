"""What the commands, training, benches and the demo show on a terminal and write to disk."""
