"""What the operating system is asked for: files, signals, failures. Torch-free, imports nothing of ours."""
