"""What each stage of a run will take in memory and time, and how to split the work so that it fits."""
