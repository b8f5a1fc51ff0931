"""What is measured: one room for each question."""
