"""Before anything is run: what each stage will take of memory and time, and how it is cut to fit."""
