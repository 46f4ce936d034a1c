"""Text and numbers: problems, rationales, grading, pairs. Nothing here imports torch."""
