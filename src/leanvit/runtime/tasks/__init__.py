"""What a bundle of each task returns, a file a task: inputs, results, lines, pictures and metric. No torch."""
