"""What the user takes home: a GGUF file of the trained model, and a solver that runs it."""
